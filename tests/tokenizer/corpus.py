"""More than a thousand lines of text that are hard to cut alike: the same ones on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

#: Sentences in many scripts, and emoji, a line each.
SAMPLES = tuple(Path(__file__).with_name("samples.txt").read_text(encoding="utf-8").splitlines())
CODE = (
    "def f(x: int = 0, *args, **kwargs) -> None:\n    return x ** 2 if x != 0 else -1  # comment",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    "\tif err != nil {\n\t\treturn nil, fmt.Errorf(\"%w\", err)\n\t}",
    '{"key": [1, 2.5e-10, null, true], "nested": {"a\\n": "\\u00e9"}}', "<div class='a b'><!-- no --><br/>&nbsp;</div>",
    "SELECT * FROM t WHERE id IN (1,2,3) AND name LIKE '%x%';",
    "grep -rn \"foo\" . | awk '{print $1}' > /dev/null 2>&1",
    "let v: Vec<&'a str> = s.split(\"::\").collect::<Vec<_>>();", "\\frac{1}{\\sqrt{2\\pi}} \\int_{-\\infty}^{\\infty}",
    "https://example.com/a/b?c=d&e=%20f#g", "C:\\Users\\x\\Documents\\file (1).txt", "x=1;y=2\r\nz=3\r\n",
    "a\n\n\n\nb\n \n  \n",
    "+1 (555) 010-9999, 12345678901234567890, 3.14159, 0xDEADBEEF, 1_000_000", "@@ -1,7 +1,9 @@\n-old\n+new",
)  # fmt: skip
#: Of Llama 3, then of SentencePiece models, then things that only look like one.
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>",
    "<|reserved_special_token_1|>", "<|reserved_special_token_200|>", "<s>", "</s>", "<unk>", "<0x0A>",
    "[INST]", "<|eot_id",
    "<|unknown|>", "< s >", "▁", "▁▁a",
)  # fmt: skip
REPEATED = (
    *"aetxA019-=_*#.,!/\\(\t\n \u3000\xa0", "\u00e9", "\u0436", "\u6f22",
    "\u3042", "\uac00", "\u2591", "\U0001f600", "▁", "ab", "\r\n", " a",
)  # fmt: skip


def lines() -> list[str]:
    """Different lines, a few thousand."""
    return list(dict.fromkeys(_lines()))


def _lines() -> Iterator[str]:
    plain = (*SAMPLES, *CODE, *SPECIAL)
    for text in plain:
        yield from (text, f" {text}", f"   {text}  ", f"{text}\n", f"\t{text}\t", text.upper(), text[::2])
    for text in REPEATED:
        for count in (*range(1, 20), 31, 32, 33, 64, 100, 257):
            yield text * count
        yield from (f"{text * 15} x", f"x {text * 16}", f" {text * 7} ")
    for special in SPECIAL:
        yield from (f"{special}{special}", f"word{special}word", f"word {special} word", f"{special}  two spaces")
    yield from (chr(number) for number in (*range(1, 0x250), *range(0x2000, 0x2070)))
    random_numbers = random.Random(0)
    for _ in range(600):
        parts = random_numbers.choices([*plain, *REPEATED, " ", "  ", "\n"], k=random_numbers.randrange(2, 6))
        yield "".join(part[: random_numbers.randrange(1, 40)] for part in parts)
    for _ in range(300):
        yield "".join(map(chr, random_numbers.choices([*range(32, 0x3000), *range(0x1F300, 0x1F700)], k=12)))
