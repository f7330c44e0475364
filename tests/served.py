"""A server of one folder, with the ranges that GDAL asks for: ``python served.py FOLDER`` prints its address."""

from __future__ import annotations

import functools
import http.server
import io
import sys
from pathlib import Path


class Ranges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send_head(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        data, asked = path.read_bytes(), self.headers.get("Range", "")
        first, last = 0, len(data) - 1
        if asked.startswith("bytes="):
            start, _, stop = asked[6:].partition("-")
            first, last = int(start), min(int(stop or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        return io.BytesIO(data[first : last + 1])


if __name__ == "__main__":
    handler = functools.partial(Ranges, directory=sys.argv[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
