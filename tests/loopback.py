"""A web server on this machine that misbehaves as it is told, for the tests of downloads."""
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """What the server sends: files by path, and how.

    cut: bytes after which a connection breaks, once for each entry; etag: the version it names;
    ranges: whether it can continue; says: a Content-Length that is not true.
    """
    def __init__(self):
        self.files = {}
        self.cut = []
        self.etag = '"1"'
        self.ranges = True
        self.says = None
        self.asked = []              # (path, Range header) of every request


@contextmanager
def serving():
    """Yields (the site, its address)."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            answer(self, site)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield site, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def answer(request: BaseHTTPRequestHandler, site: Site) -> None:
    wanted = request.headers.get("Range")
    site.asked.append((request.path, wanted))
    blob = site.files.get(request.path)
    if blob is None:
        request.send_error(404)
        return
    start = 0
    same = request.headers.get("If-Range", site.etag) == site.etag
    if wanted and site.ranges and same:
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(blob):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(blob)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
    request.send_response(206 if start else 200)
    request.send_header("Content-Length", str(site.says or len(blob) - start))
    if site.etag:
        request.send_header("ETag", site.etag)
    request.end_headers()
    end = len(blob)
    if site.cut:
        end = start + site.cut.pop(0)
    request.wfile.write(blob[start:end])
    request.close_connection = True
