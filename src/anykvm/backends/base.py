"""The waist: what a backend is. KVM's own ABI, with file descriptors, integers and errno, and nothing invented.

A backend stands where the kernel stands. What a C program reaches with ``open("/dev/kvm")``, ``ioctl()``, ``mmap()``
and ``close()``, the API and the layers reach with the five methods below; a layer is a backend that wraps another,
which it has as ``inner``.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Backend(Protocol):
    """Something that speaks KVM's ABI.

    Descriptors are real ones of this process: they can be polled, duplicated and passed on. Every method may be called
    from any thread. ``ioctl`` releases the GIL while it waits or runs a guest.

    >>> import anykvm
    >>> backend = anykvm.backend()
    >>> isinstance(backend, Backend), backend.name in ("soft", "device")
    (True, True)
    >>> fd = backend.open()
    >>> backend.ioctl(fd, 0xAE00)  # KVM_GET_API_VERSION
    12
    >>> backend.close(fd)
    """

    @property
    def name(self) -> str:
        """Which backend: ``"soft"`` or ``"device"``; a layer gives the name of what it wraps."""
        ...

    @property
    def profile(self) -> str:
        """Which KVM's behaviour: a profile's name, or ``"kernel"`` for what the running kernel does."""
        ...

    def open(self) -> int:
        """Open the system file, as ``open("/dev/kvm", O_RDWR | O_CLOEXEC)``; returns a descriptor.

        Raises OSError: ENOENT, EACCES, ENODEV and what else open(2) gives; EMFILE.
        """
        ...

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Do ioctl ``request`` on ``fd``; returns the kernel's non-negative result.

        ``arg`` is the integer argument or the address of the argument structure, as the request defines.
        Raises OSError with the kernel's errno; its ``strerror`` begins with the ioctl's name (``KVM_RUN: ...``) and
        names what is wrong where the backend knows.
        """
        ...

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Map ``length`` bytes of ``fd`` at ``offset``, read-write and shared; returns the address.

        A vCPU's pages: 0 kvm_run, 1 the PIO data, 2 the coalesced ring, from 64 on the dirty ring.
        Raises OSError: EINVAL for a range that is not there, ENODEV for a file that cannot be mapped.
        """
        ...

    def munmap(self, address: int, length: int) -> None:
        """Undo ``mmap``. Raises OSError: EINVAL."""
        ...

    def close(self, fd: int) -> None:
        """Close a descriptor. What it stood for lives on while another descriptor or a mapping refers to it.

        Raises OSError: EBADF.
        """
        ...


def layers(backend: Backend) -> tuple[str, ...]:
    """Name the layers of a backend, the outermost first.

    >>> import anykvm
    >>> layers(anykvm.backend())
    ()
    """
    inner: Backend | None = getattr(backend, "inner", None)
    return () if inner is None else (type(backend).__name__, *layers(inner))
