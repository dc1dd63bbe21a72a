"""Every error that blip2 raises on purpose.

```
Blip2Error
├── ImageError        an image cannot be opened or does not fit the encoder
├── CheckpointError   a file of weights is missing, damaged or of another shape
├── PromptError       a prompt is empty, too long or does not fit the model
├── ConfigError       a configuration or recipe has a wrong or unknown key
├── DataError         training or evaluation data cannot be read
└── MissingExtraError a feature needs a package that is not installed
```

A message says what was wrong, with which input, and what to do about it.
"""


class Blip2Error(Exception):
    """Root of the tree: catch this to catch everything that blip2 raises on purpose."""


class ImageError(Blip2Error):
    """An image cannot be opened, is not an image, or does not fit the encoder."""


class CheckpointError(Blip2Error):
    """A file of weights is missing, damaged, or does not match its configuration."""


class PromptError(Blip2Error):
    """A prompt, question or choice cannot be used."""


class ConfigError(Blip2Error):
    """A configuration, recipe or argument has a wrong value or an unknown key."""


class DataError(Blip2Error):
    """Training or evaluation data is missing, damaged or empty."""


class MissingExtraError(Blip2Error, ImportError):
    """An optional package is needed and not installed.

    Args:
        feature: what the caller wanted, as a noun phrase.
        extra: the name in `pip install "blip2[extra]"`.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs optional packages: pip install "blip2[{extra}]"')
        self.extra = extra
