"""The kernel's KVM, through /dev/kvm."""

from anykvm.backends.device.device import DeviceBackend as DeviceBackend
