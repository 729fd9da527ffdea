"""KVM's API anywhere."""
