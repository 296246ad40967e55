"""One function a command: options in, report out; nothing prints."""
