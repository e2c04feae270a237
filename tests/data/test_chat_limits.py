"""What a template may take: time and memory, in any thread."""

import subprocess
import sys
import threading
import time

import pytest

from nanovlm.data import template as templates
from nanovlm.data.template import compile_template, render
from nanovlm.errors import UserError

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}%s{% endfor %}{% endfor %}"
LONG = "{% set ns = namespace(x='0123456789') %}{% for i in range(18) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
MANY = "{% set ns = namespace(x=[1]) %}{% for i in range(18) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
LISTS = LONG + "{% set ns.l = [ns.x] %}{% for i in range(16) %}{% set ns.l = ns.l + ns.l %}{% endfor %}"

SLOW = {
    "loops": LOOPS.replace("%s", ""),
    "loops in a filter": "{% for i in range(99999) if (range(99999) | sum) < 0 %}{% endfor %}",
    "calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "callers": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{% call m() %}{% endcall %}{% endcall %}",
    "recursive loops": "{% for i in range(9) recursive %}{% if loop.depth < 60 %}{{ loop(range(9)) }}{% endif %}"
    "{% endfor %}",
    "maps": "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "tests": "{{ range(99999) | select('in', range(99999) | list) | select('in', range(99999) | list) | list }}",
    "blocks": "{% generation %}" + LOOPS.replace("%s", "") + "{% endgeneration %}",
    "one filter after the other": "{% for i in range(99999) %}{% set x = messages | map(attribute='role') | list"
    " | sort | unique | list | string | replace('u', 'uu') | wordcount %}" + "{% for j in range(999) %}{% endfor %}" * 9
    + "{% endfor %}",
}  # fmt: skip
LARGE = {
    "join": LONG + "{{ ns.x.join(range(99999) | map('string') | list) }}",
    "join filter": LONG + "{{ range(99999) | join(ns.x) }}",
    "replace": LONG + "{{ ns.x.replace('0', ns.x) }}",
    "replace filter": LONG + "{{ ns.x | replace('0', ns.x) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(1000000) }}",
    "translate": LONG + "{{ ns.x.translate({48: ns.x}) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of an argument": "{{ '{:>{w}}'.format('', w=999999) * 1000 }}",
    "format map": "{{ '{:>{w}}'.format_map({'w': 10 ** 9}) }}",
    "one argument many times": LONG + "{{ ('%(x)s' * 999) % {'x': ns.x} }}",
    "one argument of format many times": LONG + "{{ ('{0}' * 999).format(ns.x) }}",
    "one argument of the filter many times": LONG + "{{ ('%(x)s' * 999) | format(x=ns.x) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "indent with a text": LONG + "{{ 'a\\nb' | indent(ns.x, true) }}",
    "tojson": "{{ [1] | tojson(indent=1000000000) }}",
    "wordwrap": LONG + "{{ ns.x | wordwrap(1, wrapstring=ns.x) }}",
    "printed lists": LISTS + "{{ ns.l }}",
    "joined lists": LISTS + "{{ ns.l ~ '' }}",
    "lists as json": LISTS + "{{ ns.l | tojson }}",
    "lists as text": LISTS + "{{ ns.l | string }}",
    "sorted lists": LISTS + "{{ ns.l | sort | length }}",
    "formatted lists": LISTS + "{{ '%s' % ns.l }}",
    "texts kept": LONG + "{% set ns.l = [] %}{% for i in range(9999) %}{% set ns.l = ns.l + [ns.x ~ i] %}{% endfor %}",
    "slices kept": LONG + "{% set ns.l = [] %}{% for i in range(9999) %}{% set ns.l = ns.l + [ns.x[i:]] %}{% endfor %}",
    "blocks kept": LONG + "{% set ns.l = [] %}{% for i in range(9999) %}{% set y %}{{ ns.x }}{{ i }}{% endset %}"
    "{% set ns.l = ns.l + [y] %}{% endfor %}",
    "blocks that double": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "macros that double": "{% macro m(n) %}{% if n %}{% set y = m(n - 1) %}{{ y }}{{ y }}{% else %}ab{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "constants": "{{ 'ab' * 999 * 999 * 999 }}",
    "output": LONG + "{% for i in range(99) %}{{ ns.x }}{% endfor %}",
    "text of the template": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "lists of lists": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.5)


def attempt(source):
    """Render, and return what was raised, and the seconds of computing."""
    start = time.thread_time()
    try:
        render(compile_template(source)[0], messages=[{"role": "user", "content": "a"}])
    except Exception as error:
        return error, time.thread_time() - start
    return None, time.thread_time() - start


@pytest.mark.parametrize("is_thread", [False, True])
@pytest.mark.parametrize("name", SLOW)
def test_rendering_ends(name, is_thread):
    """Signals, which stop what a record does, reach the main thread alone."""
    results = []
    thread = threading.Thread(target=lambda: results.append(attempt(SLOW[name])))
    if is_thread:
        thread.start()
        thread.join(60)
    else:
        results.append(attempt(SLOW[name]))
    (error, seconds), = results  # fmt: skip
    assert "rendering took more than 0.5 s" in str(error) and seconds < 3


@pytest.mark.parametrize("name", LARGE)
def test_rendering_takes_little_memory(name):
    """In a process that may have 2.5 GB: what is refused is refused before it is there."""
    code = (
        "import resource, sys\n"
        "from nanovlm.data.template import compile_template, render\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2500 * 2**20,) * 2)\n"
        "try:\n    render(compile_template(sys.argv[1])[0], messages=[])\n"
        "except MemoryError: print('memory')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "else: print('nothing')\n"
        # not ru_maxrss, in which the largest size of the process that started this one stays
        "status = open('/proc/self/status').read()\n"
        "print(int(status.split('VmHWM:')[1].split()[0]) // 1024)"
    )
    command = [sys.executable, "-c", code, LARGE[name]]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    assert "not allowed" in output[0], output
    assert int(output[1]) < 1500, output


def test_a_template_that_calls_itself_without_end():
    error, _ = attempt("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    assert isinstance(error, RecursionError)


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "a" * (10**6 + 1)],
)
def test_what_cannot_be_compiled_is_one_sentence(source):
    with pytest.raises(UserError, match=r"the chat template (cannot be compiled|has )"):
        compile_template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ strftime_now.__func__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages | map(attribute='__class__') | list | first }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_python_is_out_of_reach(source):
    template, _ = compile_template(source)
    try:
        text = render(template, messages=[{"role": "user"}])
    except Exception:
        return
    assert text.strip() == ""


def test_each_conversation_has_its_own_limit():
    template, _ = compile_template(LONG + "{{ ns.x | length }}")
    for _ in range(30):
        assert render(template) == str(10 * 2**18)
