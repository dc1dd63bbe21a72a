"""Many images: read ahead of the model, captioned in batches that fit, and written to the disk so that nothing is lost.

```
paths ─ opened (threads) ─► squares ─ each (batches) ─► captions, vectors ─ a sink ─► .jsonl or .txt
```
"""

from blip2.bulk.captions import caption_files, captions
from blip2.bulk.reading import each
from blip2.bulk.sinks import Captioned, Existing, Failure, Report

__all__ = [
    "Captioned",
    "Existing",
    "Failure",
    "Report",
    "caption_files",
    "captions",
    "each",
]
