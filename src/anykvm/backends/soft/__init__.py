"""KVM in user space: the soft backend."""

from anykvm.backends.soft import pure

if pure.wanted():
    pure.load()

from anykvm.backends.soft.backend import SoftBackend as SoftBackend  # noqa: E402
from anykvm.backends.soft.profiles import PROFILES as PROFILES  # noqa: E402
from anykvm.backends.soft.profiles import Profile as Profile  # noqa: E402
