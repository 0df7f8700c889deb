"""The two forms of a prompt: the turns of a chat, for a template; or the plain text that the paper's mid-training data have."""

from __future__ import annotations

import hashlib

from megatron_prism.eval.sets.rows import Row

Prompt = str | tuple[dict[str, str], ...]
ID_BYTES = 12


def asked(text: str, chat: bool, before_answer: str = "\n") -> Prompt:
    """Return a text as a user's turn, or as `User: ...` and a begun `Assistant:`.

    Source: PRISM section 3.1 (every utterance begins "User:" or "Assistant:", one line break between them).
    """
    return ({"role": "user", "content": text},) if chat else f"User: {text}{before_answer}Assistant:"


def id_of(row: Row, text: str, *names: str) -> str:
    """Return the record's own id in one of these fields, else one from its text: the same in every copy of the set."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=ID_BYTES).hexdigest()
