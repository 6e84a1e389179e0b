"""What of a text no file can hold."""

import json


def holds_half_characters(value) -> bool:
    """Whether a text in a JSON document has a surrogate without its other half, as JSON can spell it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
