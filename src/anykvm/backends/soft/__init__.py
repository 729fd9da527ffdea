"""KVM in user space: the soft backend."""

from anykvm.backends.soft import pure

if pure.wanted():
    pure.load()

from anykvm.backends.soft.backend import SoftBackend as SoftBackend  # noqa: E402
from anykvm.backends.soft.devices import PciBar as PciBar  # noqa: E402
from anykvm.backends.soft.devices import SgxVepc as SgxVepc  # noqa: E402
from anykvm.backends.soft.host_memory import DeviceMapping as DeviceMapping  # noqa: E402
from anykvm.backends.soft.poison import poison as poison  # noqa: E402
from anykvm.backends.soft.poison import unpoison as unpoison  # noqa: E402
from anykvm.backends.soft.profiles import PROFILES as PROFILES  # noqa: E402
from anykvm.backends.soft.profiles import Profile as Profile  # noqa: E402
