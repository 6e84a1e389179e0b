"""The Alpaca prompt templates, asked of the model in training, inference and scoring alike.

The strings are the protocol of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, README).
"""

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
RESPONSE_MARK = "\n\n### Response:"
STOP_STRING = "### Instruction:"  # an answer that goes on to a new instruction ends before it


def render_prompt(instruction: str, input: str = "") -> str:
    """The prompt of one instruction, up to and with the response mark."""
    template = WITH_INPUT if input.strip() else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)
