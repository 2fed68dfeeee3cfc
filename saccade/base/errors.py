"""The errors a user can cause. Each message states the fact, the value and the next step."""


class SaccadeError(Exception):
    """Base of every error raised for bad input; the command line prints it as one line."""


class CheckpointError(SaccadeError):
    """A checkpoint is absent, damaged, or not a Qwen2.5-VL."""


class MediaError(SaccadeError):
    """A picture or video cannot be read, or exceeds a limit."""


class PromptError(SaccadeError):
    """Messages are malformed, or the prompt does not fit the model."""


class OptionError(SaccadeError):
    """An option is unknown, out of range, or contradicts another."""


class DeviceError(SaccadeError):
    """The machine lacks what was asked for: a device, an instruction set, memory."""
