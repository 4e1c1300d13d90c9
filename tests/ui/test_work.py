import threading
import time

import pytest

from retour.errors import RetourError
from retour.ui.work import Stopped, Token, make
from ui.cases import recipe, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def news(model, gradient, **options):
    seen = []
    made = make(recipe(steps=6), model, gradient, tell=seen.append, **options)
    return seen, made


def test_progress_grows_to_the_end_and_shows_previews(model, gradient):
    seen, made = news(model, gradient, previews=3)
    parts = [p.fraction for p in seen]
    assert parts == sorted(parts) and parts[-1] == pytest.approx(1) and 0 < parts[0] < 0.1
    assert [p.phase for p in seen] == ["invert"] * 6 + ["edit"] * 6
    shown = [(p.phase, p.step) for p in seen if p.preview is not None]
    assert shown == [(phase, k) for phase in ("invert", "edit") for k in (2, 4, 6)]
    assert all(p.preview.size == made.after.size for p in seen if p.preview is not None)
    assert (
        seen[-1].calls == made.record["network_calls"] + made.record["inversion"]["network_calls"]
    )


def test_watching_changes_no_pixel_and_no_count(model, gradient):
    _, watched = news(model, gradient)
    seen, plain = news(model, gradient, previews=0)
    assert plain.after.tobytes() == watched.after.tobytes()
    assert plain.record["nfe"] == watched.record["nfe"]
    assert all(p.preview is None for p in seen)


def test_the_last_preview_is_near_the_result(model, gradient):
    seen, made = news(model, gradient)
    last = [p.preview for p in seen if p.preview is not None][-1]
    assert last.size == made.after.size and last.tobytes() != made.before.tobytes()


@pytest.mark.parametrize("inverter", ["ddim", "edit-friendly", "null-text", "fixed-point"])
def test_cancel_stops_before_the_next_network_call(inverter, model, gradient):
    """Inner loops included: the network is not called again once the token is cancelled."""
    token, calls = Token(), []
    network = model.network

    def counted(*given):
        calls.append(token.cancelled)
        if len(calls) == 2:
            token.cancel()
        return network(*given)

    model.network = counted
    try:
        with pytest.raises(Stopped):
            make(recipe(inverter=inverter, steps=6), model, gradient, token=token)
    finally:
        del model.network
    assert calls == [False, False]


def test_cancel_before_the_start_does_nothing(model, gradient):
    token = Token()
    token.cancel()
    with pytest.raises(Stopped):
        make(recipe(model="never asked"), None, gradient, token=token)


def test_hooks_are_gone_after_a_cancel(model, gradient):
    before = {name: type(p) for name, p in model.net.attn_processors.items()}
    token = Token()
    with pytest.raises(Stopped):
        make(
            recipe(),
            model,
            gradient,
            token=token,
            tell=lambda p: p.phase == "edit" and token.cancel(),
        )
    assert {name: type(p) for name, p in model.net.attn_processors.items()} == before


def test_a_job_may_not_run_for_ever(model, gradient):
    token = Token(seconds=0.05)
    with pytest.raises(RetourError, match="more than the 0.05 seconds"):
        make(recipe(steps=200), model, gradient, token=token, tell=lambda p: time.sleep(0.02))


def test_impossible_pairs_are_refused_before_any_work(model, gradient):
    calls = []
    with pytest.raises(RetourError, match="does not go with inverter"):
        make(recipe(editor="infedit", inverter="ddim"), model, gradient, tell=calls.append)
    assert not calls


def test_cancelling_from_another_thread(model, gradient):
    token, begun = Token(), threading.Event()
    threading.Thread(target=lambda: (begun.wait(10), token.cancel())).start()

    def tell(progress):
        begun.set()
        time.sleep(0.01)

    with pytest.raises(Stopped):
        make(recipe(steps=200), model, gradient, token=token, tell=tell)
