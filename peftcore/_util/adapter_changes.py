"""The latest change of any adapter's attributes, or of the adapters that any layer has, in this process.

What was looked up in adapters and layers still holds if `adapter_changes.latest` is the same object as at that time.
This is one comparison. Each adapter and each layer also counts its own changes, but reading many counts takes long.
"""

latest = object()
"""It stands for the latest change, and is another object after the next one."""


def note() -> None:
    """Note a change that has just been made."""
    global latest
    latest = object()
