"""Parts of the HTTP library that huggingface_hub runs on: httpx2, or httpx before its release 2."""

import huggingface_hub

if int(huggingface_hub.__version__.split(".")[0]) >= 2:
    from httpx2 import HTTPError, HTTPStatusError, SyncByteStream, TransportError
else:
    from httpx import HTTPError, HTTPStatusError, SyncByteStream, TransportError  # pyright: ignore[reportMissingImports]

__all__ = ["HTTPError", "HTTPStatusError", "SyncByteStream", "TransportError"]
