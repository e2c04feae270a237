"""Messages -> spans. Renders the chat template with marks in the places of the parts, which the parts then take.

So we know of every character whether the template or a message wrote it, and the trained span of an answer needs no
second tokenisation. A trained span is what the model has to write: everything from the end of the generation prompt
through the end-of-turn token after the message.

A template can look into a message, as those of Qwen3 do to find `</think>`. So the conversation is rendered once more
as it is, and this has to be what the marks gave. If it is not, the white space and thinking tags of the messages are
left in their places and marks stand between them; if it still is not, the conversation is refused.
"""

import functools
import itertools
import re

from nanovlm.data.spans import THINK, Span
from nanovlm.data.template import BLOCK_END, BLOCK_START, compile_template, render, set_time
from nanovlm.errors import UserError, printable

# Stands for a text or an image while the template is rendered, within white space that no template writes: whether
# that is left shows whether the template strips its input.
MARK = "(\u2003?)\ue000([0-9]+)\ue001(\u2003?)"
GUARD = "\ue004"  # keeps the white space of a text that is cut from being taken for that of a mark
TAGS = re.compile(f"({'|'.join(map(re.escape, THINK))})")


class Renderer:
    """Turns conversations into spans with one chat template."""

    def __init__(self, source: str, tokens: dict[str, str], image: str | None, special: dict[str, int]):
        """`tokens` are bos_token and the like, `image` is the image token. Raises UserError for a faulty template."""
        self.template, self.variables = compile_template(source)
        self.tokens, self.image = tokens, image
        self.special_pattern = re.compile("|".join(re.escape(token) for token in special if token not in THINK))
        self.thinks = any(tag in source for tag in THINK)
        self.has_blocks = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self._literals = functools.lru_cache(maxsize=256)(self._render_literals)

    def spans(self, messages: list[dict], images: list[Span], add_generation_prompt=False) -> tuple[Span, ...]:
        """Render messages, whose contents are lists of parts, as spans whose concatenation is the text."""
        if set_time(self.template):
            self._literals.cache_clear()
        spans, text, is_list = self._fill(*self._shape(messages, images), add_generation_prompt)
        real = self._render_real(messages, is_list, add_generation_prompt)
        if text != real:
            spans, again, is_list_again = self._fill(*self._shape(messages, images, is_cut=True), add_generation_prompt)
            if again != real or is_list_again != is_list:
                raise UserError(_difference(text, real))
        return spans

    def _shape(self, messages, images, is_cut=False):
        """Return the role and the kinds of parts of each message, and a span for each mark.

        A kind is "image", "text" or, of a text that is cut, what stands around its marks.
        """
        unseen = iter(images)
        shape, content = [], []
        for message in messages:
            is_answer, kinds = message["role"] == "assistant", []
            for part in message["content"]:
                if part["type"] == "image":
                    kinds.append("image")
                    content.append(next(unseen))
                    continue
                kind, texts = _cut(part["text"], self.thinks and is_answer) if is_cut else ("text", [part["text"]])
                kinds.append(kind)
                content += [Span(text, is_trained=is_answer) for text in texts]
            shape.append((message["role"], tuple(kinds)))
        return tuple(shape), content

    def _fill(self, shape, content, add_generation_prompt):
        """Return the spans, the text as the template would write it, and whether it takes contents as lists."""
        pieces, is_list = self._literals(shape, add_generation_prompt)
        images = [number for number, span in enumerate(content) if span.is_image]
        spans, text = [], []
        for piece in pieces:
            if isinstance(piece, Span):
                spans.append(piece)
                text.append(piece.text)
                continue
            number, strip_left, strip_right, in_block = piece
            span = content[number]._replace(in_block=in_block)
            if span.is_image:
                spans.append(span)
                text.append(self.image if is_list else _mark(images.index(number)))
                continue
            written = span.text.lstrip() if strip_left else span.text
            written = written.rstrip() if strip_right else written
            text.append(written)
            tagged = TAGS.split(written) if self.thinks and span.is_trained else [written]
            spans += [span._replace(text=x, from_template=i % 2 == 1) for i, x in enumerate(tagged)]
        return tuple(spans), "".join(text), is_list

    def _render_literals(self, shape, add_generation_prompt):
        """Render the template: literal Spans and, between them, (mark, strips left, strips right, in block) of a text.

        Text that precedes an answer but is not in the generation prompt, like the space of "Assistant: ", has to be
        written by the model: it is trained. Answers that follow the same text have the same generation prompt, so that
        it is rendered once for all of them.
        """
        rendered, is_list = self._render_marks(shape, add_generation_prompt)
        pieces = re.split(MARK, rendered)
        owners = [i for i, (_, kinds) in enumerate(shape) for kind in kinds for _ in range(_num_marks(kind))]
        literals, prompts, answers = [], {}, set()
        raw, in_block = pieces[0], False

        def add(num_untrained=None):
            """Add the spans of the text before a mark."""
            nonlocal in_block
            position = 0
            for text in re.split(f"([{BLOCK_START}{BLOCK_END}])", raw):
                if text in (BLOCK_START, BLOCK_END):
                    in_block = text == BLOCK_START
                    continue
                text = text.replace(GUARD, "")
                end = len(text) if num_untrained is None else max(0, num_untrained - position)
                position += len(text)
                span = Span(text[:end], from_template=True, in_block=in_block if self.has_blocks else None)
                literals.extend([span, span._replace(text=text[end:], is_trained=True)])

        for left, number, right, following in zip(*(pieces[i::4] for i in range(1, 5)), strict=True):
            message, num_untrained = owners[int(number)], None
            if message and message not in answers and shape[message][0] == "assistant":
                answers.add(message)
                written = _written(raw)
                case = written, shape[message - 1]
                if case not in prompts:
                    prompts[case] = re.split(MARK, self._render_marks(shape[:message], True)[0])[-1]
                prompt = _written(prompts[case])
                if written.startswith(prompt) and not self.special_pattern.search(written.removeprefix(prompt)):
                    num_untrained = len(prompt)
            add(num_untrained)
            literals.append((int(number), not left, not right, in_block if self.has_blocks else None))
            raw = following
        add()
        return tuple(piece for piece in literals if not isinstance(piece, Span) or piece.text), is_list

    def _render_marks(self, shape, add_generation_prompt) -> tuple[str, bool]:
        """Render the template with marks, in the form of content that shows every part once; say if that is a list.

        Content is a string or a list of parts. With images the list is tried first, as a template may write
        something beside an image. In that form the template writes the image token, which becomes the image's mark.
        What stands around the marks of an answer that is cut may make the template leave some out, not all.
        """
        number, image = itertools.count(), self.image
        messages, image_marks, needed, answers = [], [], set(), []
        for role, kinds in shape:
            parts = []
            answers += [set()] if role == "assistant" else []
            for kind in kinds:
                marks = [next(number) for _ in range(_num_marks(kind))]
                if isinstance(kind, tuple):
                    after = [f"{GUARD}{_mark(n)}{GUARD}{text}" for n, text in zip(marks, kind[1:], strict=True)]
                    parts.append({"type": "text", "text": "".join((kind[0], *after))})
                    (answers[-1] if role == "assistant" else needed).update(marks)
                    continue
                needed.update(marks)
                parts.append({"type": kind, "text": f"\u2003{_mark(marks[0])}\u2003"})
                image_marks += [parts[-1]["text"]] if kind == "image" else []
            messages.append((role, parts))

        def is_right(text):
            marks = [int(mark) for _, mark, _ in re.findall(MARK, text)]
            shown = set(marks)
            is_answered = all(shown & answer for answer in answers if answer)
            return len(marks) == len(shown) and needed <= shown and is_answered

        def give_marks(text):
            if image is not None and text.count(image) == len(image_marks):
                unseen = iter(image_marks)
                return re.sub(re.escape(image), lambda _: next(unseen), text)
            return text

        refusal = None
        for is_list in (True, False) if image_marks else (False, True):
            try:
                text = self._render(messages, is_list, add_generation_prompt, shows_blocks=True)
            except Exception as error:  # a template can raise any
                refusal = refusal or error if is_list else error
                continue
            text = give_marks(text) if is_list else text
            if is_right(text):
                return text, is_list
        if refusal is None:
            raise UserError("the chat template does not show every message exactly once")
        raise self._refused(messages, refusal) from refusal

    def _render_real(self, messages, is_list, add_generation_prompt) -> str:
        """Render the conversation as it is."""
        images = itertools.count()
        parts = [
            (
                message["role"],
                [
                    part if part["type"] == "text" else {"type": "image", "text": _mark(next(images))}
                    for part in message["content"]
                ],
            )
            for message in messages
        ]
        try:
            return self._render(parts, is_list, add_generation_prompt)
        except Exception as error:  # a template can raise any
            raise self._refused(parts, error) from error

    def _render(self, messages, is_list, add_generation_prompt, shows_blocks=False) -> str:
        """Render (role, parts) of messages as lists of parts or as strings."""

        def content(parts):
            if not is_list:
                return "".join(part["text"] for part in parts)
            return [{"type": "image"} if part["type"] == "image" else part for part in parts]

        messages = [{"role": role, "content": content(parts)} for role, parts in messages]
        options = {"messages": messages, "add_generation_prompt": add_generation_prompt} | self.tokens
        return render(self.template, shows_blocks, **options)

    def _refused(self, messages, error) -> UserError:
        roles = ", ".join(role for role, _ in messages)
        return UserError(f"the chat template refuses a conversation of {roles}: {error}")


def check_blocks(spans: tuple[Span, ...], end_token: str | None):
    """Raise UserError where a template's generation blocks are not around the answers and their ends.

    A block may hold more of the template's own text, such as a line end after the answer.
    """
    answer_is_open = False
    for span in spans:
        text, is_needed = span.text, span.is_trained
        if span.is_trained:
            answer_is_open = True
        elif span.from_template and answer_is_open and not span.is_image:
            before, end, _ = text.partition(end_token) if end_token else (text, "", "")
            text, is_needed, answer_is_open = before + end, True, not end
        if is_needed and text and span.in_block is False:
            raise UserError(
                f"the chat template's generation blocks leave out {_quote(text)}, which the model has to write"
            )
        if span.in_block and not span.from_template and not span.is_trained:
            raise UserError(f"the chat template's generation blocks hold {_quote(text)}, which is of no answer")


def _cut(text, has_tags):
    """Cut a text into what a template may look for, white space and tags, and what stands between, however little."""
    around, between = [""], []
    for piece in TAGS.split(text) if has_tags else [text]:
        if has_tags and piece in THINK:
            around[-1] += piece
            continue
        core = piece.strip()
        before, after = piece.split(core, 1) if core else (piece, "")
        around[-1] += before
        around.append(after)
        between.append(core)
    return tuple(around), between


def _num_marks(kind) -> int:
    return len(kind) - 1 if isinstance(kind, tuple) else 1


def _mark(number) -> str:
    return f"\ue000{number}\ue001"


def _written(text) -> str:
    return re.sub(f"[{BLOCK_START}{BLOCK_END}{GUARD}]", "", text)


def _quote(text) -> str:
    return repr(printable(text, 80))


def _difference(text, real) -> str:
    """Say where a template did something to messages that it does not do to others."""
    at = next((i for i, (a, b) in enumerate(zip(text, real, strict=False)) if a != b), min(len(text), len(real)))
    start = max(0, at - 30)
    return (
        "the chat template looks into the messages and writes something else for these: "
        f"{_quote(real[start : at + 30])} where {_quote(text[start : at + 30])} would stand"
    )
