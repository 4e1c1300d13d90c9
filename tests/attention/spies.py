"""Attention controls that watch, and one that disturbs."""

from retour.attention.control import AttentionControl


class Spy(AttentionControl):
    """Remembers every call; computes no maps."""

    def __init__(self, kinds=("self", "cross", "joint")):
        self.kinds, self.calls = kinds, []

    def wants(self, site):
        return site.kind in self.kinds

    def output(self, call, out):
        self.calls.append(call)
        return out


class Maps(Spy):
    """Remembers probabilities, unchanged."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def probs(self, call, probs):
        self.seen.append((call, probs.detach().clone()))
        return probs


class Blur(AttentionControl):
    """Uniform attention, more so in later steps."""

    def probs(self, call, probs):
        part = 0.5 if call.step is None else 0.1 * call.step.index
        return (1 - part) * probs + part / probs.shape[-1]
