"""What the API and the backends both need of this process and its memory. It knows nothing of KVM."""
