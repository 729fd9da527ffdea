"""KVM in user space: the soft backend."""

from anykvm.backends.soft.backend import SoftBackend as SoftBackend
from anykvm.backends.soft.profiles import PROFILES as PROFILES
from anykvm.backends.soft.profiles import Profile as Profile
