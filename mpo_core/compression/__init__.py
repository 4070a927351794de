"""The linear layers of any model turned into structured ones, by name, and back; and a report of what that did."""
