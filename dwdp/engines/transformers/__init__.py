"""The embedded default engine: Hugging Face Transformers models, on any machine."""

from __future__ import annotations

from dwdp.engines.transformers.engine import Attachment, attach, load

__all__ = ["Attachment", "attach", "load"]
