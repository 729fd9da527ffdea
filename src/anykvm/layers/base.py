"""A layer: a backend that wraps a backend. Every layer is a ``Layer``; it changes the methods that it is about."""

from __future__ import annotations

from anykvm.backends.base import Backend


class Layer:
    """Forwards everything to ``inner``; implements ``anykvm.backends.base.Backend``.

    A subclass overrides what it changes. It works on both backends, and on top of other layers.

    >>> import anykvm
    >>> layer = Layer(anykvm.backend("soft"))
    >>> layer.name, layer.profile
    ('soft', 'documented')
    >>> with anykvm.open(layer) as kvm:
    ...     kvm.get_api_version()
    12
    """

    def __init__(self, inner: Backend) -> None:
        """Wrap ``inner``."""
        self.inner = inner

    def __repr__(self) -> str:
        """Show what it wraps."""
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def name(self) -> str:
        """The wrapped backend's name."""
        return self.inner.name

    @property
    def profile(self) -> str:
        """The wrapped backend's profile."""
        return self.inner.profile

    def open(self) -> int:
        """Forward; see ``Backend.open``."""
        return self.inner.open()

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Forward; see ``Backend.ioctl``."""
        return self.inner.ioctl(fd, request, arg)

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Forward; see ``Backend.mmap``."""
        return self.inner.mmap(fd, length, offset)

    def munmap(self, address: int, length: int) -> None:
        """Forward; see ``Backend.munmap``."""
        self.inner.munmap(address, length)

    def close(self, fd: int) -> None:
        """Forward; see ``Backend.close``."""
        self.inner.close(fd)
