"""The check of a feed before each run, done once for each new shape."""

from __future__ import annotations

from hasten.tensors import Feed, Signature


class FeedCheck:
    """Checks feeds against a signature; the same shapes again cost a microsecond. One thread at a time.

    A full check costs more than a small model's run, and a runtime alone checks too little: one converts dtypes,
    another lets two inputs disagree on a symbolic dimension.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._fits: list[tuple[str, object, object]] = []

    def __call__(self, feed: Feed) -> None:
        """Check names, dtypes and shapes.

        Raises:
            SignatureMismatch: as ``Signature.check``.
        """
        fits, at = self._fits, 0
        if len(fits) == len(feed):
            for name, array in feed.items():
                known, dtype, shape = fits[at]
                if name != known or array.dtype is not dtype or array.shape != shape:
                    break
                at += 1
            else:
                return
        self._signature.check(feed)
        self._fits = [(name, array.dtype, array.shape) for name, array in feed.items()]
