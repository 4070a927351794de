"""Turn the linear layers of any model into structured ones, by name, and back; and report what that did."""
