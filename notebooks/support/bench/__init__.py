"""``make bench``: what exact results cost, beside the other libraries (``book/benchmark.md``)."""
