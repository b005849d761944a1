"""Questions that replicas answer: what goes to them, and the backend that asks them."""
