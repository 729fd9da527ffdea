"""What the API and the backends both need of this process, and Python lacks. It knows nothing of KVM."""
