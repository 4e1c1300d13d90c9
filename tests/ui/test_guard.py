import asyncio

import pytest

from retour.ui.guard import Guard, allowed


def ask(path, method="GET", headers=None, body=b"", local=True, most=100):
    """Status and headers that a request gets, and what came through."""
    passed, sent = [], []

    async def app(scope, receive, send):
        message = await receive()
        passed.append((scope["path"], message))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860", **(headers or {})}
    scope = {
        "type": "http",
        "path": path,
        "method": method,
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
    }
    asyncio.run(Guard(app, most=most, local=local)(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), passed


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/index-a.js", "/gradio_api/queue/join"]
)
def test_the_page_itself_passes(path):
    status, headers, passed = ask(path)
    assert status == 200 and passed
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://example.com/",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/proxy=http://example.com/",
        "/gradio_api/call/run",
        "/assets/../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/gradio_api/component_server",
        "/monitoring",
    ],
)
def test_everything_else_is_refused(path):
    status, _, passed = ask(path)
    assert status == 403 and not passed and not allowed("/gradio_api/file=/etc/passwd")


def test_other_methods_hosts_and_sizes():
    assert ask("/", method="DELETE")[0] == 403
    assert ask("/", headers={"host": "evil.example"})[0] == 421
    assert ask("/", headers={"host": "evil.example"}, local=False)[0] == 200
    assert ask("/", headers={"host": "[::1]:7860"})[0] == 200
    assert ask("/gradio_api/queue/join", "POST", {"content-length": "101"})[0] == 413
    assert ask("/gradio_api/queue/join", "POST", {"content-length": "x"})[0] == 413


def test_a_body_larger_than_it_said_is_cut_off():
    _, _, passed = ask("/gradio_api/queue/join", "POST", body=bytes(101))
    assert passed[0][1] == {"type": "http.disconnect"}
