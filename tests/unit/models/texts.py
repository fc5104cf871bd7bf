"""Texts that tokenizers disagree about."""

from __future__ import annotations

TRICKY_TEXTS: tuple[str, ...] = (
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", " a", "  a", "a ", "a  ", "a   b", "1", " 1",
    "  1", "   1", "12", " 12", "  12", "123", "1234567", "  8015764 ", "x=1", "x = 10", "x  =  100", "3.14159",
    "1,000,000", "-17", "+1 555 0100", "1e-05", "0x1F", "v1.2.3", "2026-11-22", "12:30", "5%", "$5", "n°5",
    "a1b2", "1a", "a 1", "a  1", "a\n1", "a\n 1", "a\n  1", "\t1", "\t\t12", "1 2  3   4", "1\n2\n\n3", "½ ⅔ ¼",
    "x² y₂ ①", "٣ १ 五", "Ⅳ Ⅻ", "don't can't I'm we've you'll he'd she's THEY'RE It'S", "'s 's' ''",
    "“quoted” ‘single’ …", "Hello, world!", "Hello,world!", "hello...   world???",
    "snake_case camelCase kebab-case", "e.g. i.e. U.S.A.", "def f(x):\n    return x  # 2 blanks\n",
    "for i in range(10):\n        print(i, 2 ** i)\n\n\n", "if (a<b && c>=d) { x+=1; }",
    "SELECT *\n  FROM t\n WHERE id = 42;", "\tint x[10] = {0, 1, 2};\n\treturn x[3];\n",
    '{"a": [1, 2, {"b": null}]}', "<html><body class='x'>&nbsp;</body></html>",
    "https://example.org/a/b?c=1&d=%20#e", "a@b.co", "C:\\Users\\x\\1.txt",
    "| a   | b  |\n|-----|----|\n| 1   | 22 |\n|  10 |  3 |\n", "1.  one\n2.  two\n10. ten\n",
    "  - item 1\n    - item 1.1\n", "name:    Ann\nage:      7\ncity:  Oslo  12\n", "=====  1  =====",
    "--- 12 ---", "#1 ##2 ### 3", "$$x_1^2 + 10y = 3$$", "\\frac{1}{2}", "😀", "😀😀", " 😀 1",
    "👩‍👩‍👧‍👦 family", "🇳🇴🇯🇵", "👍🏽 2", "e\u0301 vs é", "Zalgo\u0300\u0301\u0302 1", "n\u0303 1  2", "ﬁ ﬂ",
    "İstanbul ıI", "日本語のテキスト", "中文 123 字", "한국어 2 글자", "ภาษาไทย 3", "עברית 4", "العربية ٥",
    "हिन्दी ६", "Ελληνικά 7", "Кириллица 8", "a\u00a0b\u00a01", "a\u2003b \u20031", "a\u200bb", "\ufeffbom",
    "zero\u0000byte", "\x1b[31mred\x1b[0m", "a\u2028b", "a\x85b", "\x1c1", "<|im_start|>", "<|im_end|>",
    "<|endoftext|>", "<|im_start|>user\nHi 1<|im_end|>\n", "a<|im_end|>b", " <|im_end|> 1", "<|im_end",
    "im_end|>", "<| im_end |>", "<|im_start|", "<|im_end|><|im_end|>", "<|IM_END|>", "<|imstart|>",
    "<||im_end||>", "the the  the   the thethe The", "ing ingring 123123 12 1212  the", "\n\n\n the\n\n",
    "'t 't 'T ''t'", "[PAD277] [PAD1]",
)  # fmt: skip
