"""Renders chat templates, which others wrote: with what transformers gives them, without Python, within limits.

A template is a program. It gets the messages and what is in `globals` and `filters`, no attribute of Python. Each step
of its loops, each call, filter, test and output looks at the time that its thread has computed; each text or list that
it makes is measured, and whatever would make a long one out of short ones is measured before. So a template ends, in
any thread, and fills no memory.
"""

import contextlib
import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Iterator

import jinja2
import jinja2.filters
import jinja2.meta
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nanovlm.errors import UserError, printable
from nanovlm.limits import time_limit

RENDER_SECONDS = 20  # of computing that rendering may take
LONGEST_TEXT = 10**7  # characters of a text, items of a list
MOST_TEXT = 10**8  # characters and items of all that is made while a conversation is rendered
LONGEST_TEMPLATE = 10**6
# Stand around what a {% generation %} block writes.
BLOCK_START, BLOCK_END = "\ue002", "\ue003"
# Filters whose numbers say how much is written.
COUNTING_FILTERS = ("indent", "center", "batch", "slice", "round", "tojson")
# Filters that do not look into the items of a list.
SHALLOW_FILTERS = ("length", "count", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr",
                   "items", "reverse", "batch", "slice", "default", "d", "attr")  # fmt: skip


class TemplateCode(CodeGenerator):
    """Compiles what jinja2 leaves to no environment, `a ~ b` and `a[1:2]`, to calls of TemplateEnvironment."""

    def visit_Concat(self, node, frame):
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node, frame):
        is_slice = isinstance(node.arg, nodes.Slice)
        self.write("environment.check(" if is_slice else "(")
        super().visit_Getitem(node, frame)
        self.write(")")


class GenerationBlock(Extension):
    """The block in which templates write what the model has to: `{% generation %}...{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller):
        text = caller()
        return f"{BLOCK_START}{text}{BLOCK_END}" if self.environment.state.shows_blocks else text  # pyright: ignore


class TemplateNamespace(Namespace):
    """What templates keep variables in, without the names by which Python's objects are taken apart."""

    def __init__(self, /, *arguments, **options):
        values = dict(*arguments, **options)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


class State(threading.local):
    """What one thread's rendering has used up."""

    until = float("inf")  # seconds of the thread
    num_made = 0
    shows_blocks = False


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Renders a template that others wrote, without access to Python, and without what would only take time or memory.

    The optimizer is off: it would compute constants while a template is compiled, where nothing is limited.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = TemplateCode

    def __init__(self):
        extensions = ["jinja2.ext.loopcontrols", GenerationBlock]
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.state = State()
        self.now, self.times = datetime.datetime.now(), {}  # what strftime_now gave
        self.finalize = self._written
        del self.globals["lipsum"], self.filters["random"], self.filters["pprint"]
        self.globals["namespace"] = TemplateNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now
        self.filters["tojson"] = _to_json
        self.filters["join"] = self._join_filter
        for name, function in self.filters.items():
            self.filters[name] = self._limited(name, function, 1000 if name in COUNTING_FILTERS else 10**6)
        for name, function in self.tests.items():
            self.tests[name] = self._limited(name, function, float("inf"))

    def _generate(self, source, *arguments, **options):
        """Let every step of a loop be counted."""
        for loop in source.find_all(nodes.For):
            counted = nodes.Call(nodes.EnvironmentAttribute("count_steps"), [loop.iter], [], None, None)
            loop.iter = counted.set_lineno(loop.lineno).set_environment(self)
        return super()._generate(source, *arguments, **options)

    def count_steps(self, items) -> Iterator:
        for item in items:
            self.tick()
            yield item

    def tick(self):
        """Raise TemplateError once the thread has computed for too long."""
        if time.thread_time() > self.state.until:
            raise jinja2.TemplateError(f"rendering took more than {RENDER_SECONDS:g} s")

    def check(self, value):
        """Return a value that the template made; raise TemplateError if it or all of them are too large."""
        self.tick()
        if isinstance(value, str | list | tuple | dict):
            if len(value) > LONGEST_TEXT:
                raise jinja2.TemplateError(f"something of length {len(value)} is not allowed")
            self.state.num_made += len(value)
            if self.state.num_made > MOST_TEXT:
                raise jinja2.TemplateError(f"more than {MOST_TEXT} characters in all are not allowed")
        if isinstance(value, int) and value.bit_length() > 4096:
            raise jinja2.TemplateError("a number of more than 4096 bits is not allowed")
        return value

    def _limited(self, name, function, largest):
        """Wrap a filter or test: numbers after its first argument are at most `largest`, results are not too long."""

        @functools.wraps(function)
        def limited(*arguments, **options):
            self.tick()
            for value in (*arguments[1:], *options.values()):
                if (isinstance(value, int) and abs(value) > largest) or (name == "indent" and _length(value) > largest):
                    raise jinja2.TemplateError(f"{name} with {printable(str(value), 40)} is not allowed")
            values = (*arguments, *options.values())
            texts = [value for value in values if isinstance(value, str)]
            if name in ("replace", "wordwrap"):
                _check_product(name, texts)
            if name == "format":
                _check_format(texts[0], values)
            if name in self.filters and name not in SHALLOW_FILTERS:
                _weigh(values)
            return self.check(function(*arguments, **options))

        return limited

    @jinja2.pass_eval_context
    def _join_filter(self, context, value, d="", attribute=None):
        """The filter `join`; what it joins is measured first."""
        items = [self.check(item) for item in value] if attribute is None else list(value)
        if len(items) * _length(d) > LONGEST_TEXT:
            raise jinja2.TemplateError(f"join with {len(items)} times {_length(d)} characters is not allowed")
        return jinja2.filters.do_join(context, items, d, attribute)

    def _strftime_now(self, form):
        self.times[form] = self.now.strftime(form)
        return self.times[form]

    def call_binop(self, context, operator, left, right):
        """Refuse results that no chat template needs: huge numbers, and texts that are repeated or padded to fill."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):  # nearly all of them
            return self.check(left + right)
        repeats = operator == "*" and any(isinstance(x, str | list | tuple) for x in (left, right))
        largest = max((abs(x) for x in (left, right) if isinstance(x, int)), default=0)
        length = max((len(x) for x in (left, right) if isinstance(x, str | list | tuple)), default=0)
        if (repeats or operator == "**") and (largest > 1000 or largest * length > LONGEST_TEXT):
            raise jinja2.TemplateError(f"{operator} with {largest} is not allowed")
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return self.check(super().call_binop(context, operator, left, right))

    def call(self, context, function, *arguments, **options):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuse arguments by which methods of texts fill memory, and results that are too long."""
        self.tick()
        values = (*arguments, *options.values())
        if any(isinstance(x, int) and abs(x) > 10**6 for x in values):
            raise jinja2.TemplateError("a call with a number above a million is not allowed")
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            name = function.__name__
            if name == "translate" or (name == "expandtabs" and values and max(values) > 1000):
                raise jinja2.TemplateError(f"{name} is not allowed")
            if name in ("format", "format_map"):
                _check_format(owner, values)
            if name == "replace":
                _check_product(name, [owner, *(x for x in values if isinstance(x, str))])
            if name == "join":
                arguments = [[self.check(item) for item in values[0]]]
                if len(arguments[0]) * len(owner) > LONGEST_TEXT:
                    raise jinja2.TemplateError("join of so much is not allowed")
        return self.check(super().call(context, function, *arguments, **options))

    def join(self, parts: tuple) -> str:
        """What `~` means."""
        _weigh(parts)
        return self.check("".join(map(str, parts)))

    def _written(self, value):
        """Return a value that is written out."""
        if not isinstance(value, str):
            _weigh(value)
        return self.check(value)

    @contextlib.contextmanager
    def limits(self, shows_blocks: bool) -> Iterator[None]:
        """Limit what this thread renders within."""
        state = self.state
        state.until, state.num_made = time.thread_time() + RENDER_SECONDS, 0
        state.shows_blocks = shows_blocks
        try:
            # Also stops what takes long between two steps, where signals arrive.
            with time_limit(RENDER_SECONDS, "rendering"):
                yield
        finally:
            state.until, state.shows_blocks = float("inf"), False


def compile_template(source: str, what: str = "the chat template") -> tuple[jinja2.Template, set[str]]:
    """Compile a template, which errors call `what`; return it and the variables that it reads. Raises UserError."""
    environment = TemplateEnvironment()
    if len(source) > LONGEST_TEMPLATE:
        raise UserError(f"{what} has {len(source)} characters, more than {LONGEST_TEMPLATE}")
    try:
        variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), variables
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{what} has an error in line {error.lineno}: {error.message}") from error
    except Exception as error:  # of Python, which compiles it, such as a {% break %} outside a loop
        raise UserError(f"{what} cannot be compiled: {error}") from error


def render(template: jinja2.Template, shows_blocks: bool = False, **variables) -> str:
    """Render a conversation, with BLOCK_START and BLOCK_END around generation blocks if it `shows_blocks`.

    Raises UserError or whatever a template raises.
    """
    environment = template.environment
    assert isinstance(environment, TemplateEnvironment)
    with environment.limits(shows_blocks):
        pieces, length = [], 0
        # As transformers gives them: known, and none.
        for piece in template.generate(**{"tools": None, "documents": None} | variables):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                raise jinja2.TemplateError(f"a text of more than {LONGEST_TEXT} characters is not allowed")
        return "".join(pieces)


def set_time(template: jinja2.Template) -> bool:
    """Give a conversation one time; tell whether the template would write another than before."""
    environment, now = template.environment, datetime.datetime.now()
    assert isinstance(environment, TemplateEnvironment)
    is_new = any(now.strftime(form) != text for form, text in environment.times.items())
    if is_new or not environment.times:
        environment.now, environment.times = now, {}
    return is_new


def _length(value) -> int:
    return len(value) if isinstance(value, str) else 0


def _weigh(value) -> int:
    """Return about how long a value is as text; refuse what is too long: lists hold one text in many places."""
    weight, items = 0, [value]
    while items:
        item = items.pop()
        weight += 10 + _length(item)
        if weight > LONGEST_TEXT + 100:
            raise jinja2.TemplateError(f"a list of more than {LONGEST_TEXT} characters in all is not allowed")
        if isinstance(item, dict):
            items += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            items += item
    return weight


def _check_product(name, texts):
    """Refuse to put a text in so many places of another, each at least a character apart, that it gets too long."""
    if texts and (len(texts[0]) + 1) * max(map(len, texts[1:]), default=1) > 10 * LONGEST_TEXT:
        raise jinja2.TemplateError(f"{name} with texts of {', '.join(str(len(x)) for x in texts)} is not allowed")


def _check_format(form, values):
    """Refuse a width that pads, of `%`, of `format`, or one that comes from an argument; and long texts many times."""
    is_padded = re.search(r"%[-#0 +]*(\*|\d{4})|\{[^{}]*:[^{}]*(\{|\d{4})", form)
    if is_padded or (form.count("%") + form.count("{")) * _weigh(values) > 10 * LONGEST_TEXT:
        raise jinja2.TemplateError(f"the format {printable(form, 40)} is not allowed")


def _check_name(name):
    if str(name).startswith("_"):
        raise jinja2.TemplateError(f"a namespace cannot have {printable(str(name), 40)}")


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter of that name, as chat templates know it: it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
