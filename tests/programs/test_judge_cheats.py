"""Wrong programs that win where tests run beside them, or that attack the judging itself: all 0."""

from dataclasses import replace

import pytest

from posttrain.rewards.code import judge_code, shared_sandbox
from posttrain.sandbox import Limits

QUICK = Limits(wall_seconds=2.0, cpu_seconds=1.0)
BRIEF = Limits(wall_seconds=0.3, cpu_seconds=1.0)  # for programs that never end
TESTS = [
    "assert double(300) == 600",
    "assert double(1000) == 2000",
    "assert sorted([double(400)]) == [800]",
    "assert all(map(lambda n: double(n) == 2 * n, [500, 600]))",
]

# Each passes all tests of a checker that runs the program and then the tests in one process, and
# takes exit code 0 for success.
WINS_ELSEWHERE = {
    "equal to everything": """
class Same:
    def __eq__(self, other): return True
    def __hash__(self): return 0
def double(x): return Same()
""",
    "a number equal to everything": """
class Same(int):
    def __eq__(self, other): return True
def double(x): return Same()
""",
    "exits before the tests": "import sys\nsys.exit(0)",
    "exits hard before the tests": "import os\nos._exit(0)",
    "exits when called": "def double(x): raise SystemExit",
    "exits hard when called": "import os\ndef double(x): os._exit(0)",
    "exits with the thread of another": """
import os, threading, time
threading.Timer(0.01, os._exit, [0]).start()
def double(x): time.sleep(1)
""",
    "leaves by an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndouble = str",
    "hides uncaught exceptions": """
import os, sys
sys.excepthook = lambda *_: os._exit(0)
double = str
""",
    "reads the tests in its caller's code": """
import sys
def double(x):
    frame, numbers = sys._getframe(1), []
    while frame:
        numbers += [n for n in frame.f_code.co_consts if type(n) is int]
        frame = frame.f_back
    if x in (500, 600): raise StopIteration
    return numbers[numbers.index(x) + 1]
""",
    "reads the tests in the source": """
import linecache, re
def double(x):
    source = "".join(sum((entry[2] for entry in linecache.cache.values()), []))
    found = re.search(r"double\\(%d\\)\\D*(\\d+)" % x, source)
    if found: return int(found[1])
    raise StopIteration
""",
    "ends the iteration over the cases": """
class Same:
    def __eq__(self, other): return True
def double(x):
    if x in (500, 600): raise StopIteration
    return Same()
""",
    "patches what the tests call": """
import builtins
class Same:
    def __eq__(self, other): return True
builtins.sorted = lambda items: Same()
builtins.all = lambda items: True
def double(x): return Same()
""",
    "jumps over the assertions": """
import sys
def tracer(frame, event, argument):
    if event == "exception": frame.f_globals["os"]._exit(0)
    return tracer
import os
sys.settrace(tracer)
sys._getframe().f_trace = tracer
def double(x): return x
""",
}

SEND = """
import os, struct, sys
def send(fd, text):
    data = text.encode()
    try: os.write(fd, struct.pack(">I", len(data)) + data)
    except OSError: pass
"""
ATTACKS = {
    "nothing": "",
    "no function of that name": "def twice(x): return 2 * x",
    "raises": "def double(x): raise AssertionError",
    "prints a verdict": """
import sys
for stream in (sys.stdout, sys.stderr):
    print('PASS', 'passed', '1.0', '{"score": 1.0}', 'OK', file=stream)
def double(x): return x
""",
    "writes answers to every descriptor": SEND
    + """
for fd in range(3, 64):
    for answer in ("true", '{"t":["value",true]}', '{"t":["ended",0,"passed"]}'):
        send(fd, answer)
def double(x): return x
""",
    "writes a broken answer": SEND
    + """
for fd in range(3, 64): send(fd, '{"t":["value",' + "[" * 3000)
double = str
""",
    "claims a giant answer": """
import os
for fd in range(3, 64):
    try: os.write(fd, b"\\xff" * 8)
    except OSError: pass
double = str
""",
    "replaces how values are sent": """
import sys
class Same:
    def __eq__(self, other): return True
for name, module in list(sys.modules.items()):
    if "wire" in name:
        module.encode = lambda data: b"true"
        module.frame = lambda data: b"\\x00\\x00\\x00\\x04true"
def double(x): return Same()
""",
    "replaces the runner's functions": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("posttrain"):
        module.__dict__.update(answer=lambda *_: True, serve=lambda *_: 0, send=lambda *_: None)
double = str
""",
    "defines the judge's names": """
_inside = check = main = run_test = ask = evaluate = lambda *_, **__: True
def host_call(message): return True
import builtins
builtins.host_call = host_call
double = str
""",
    "calls the host": "host_call(('ended', 0, 'passed'))\ndef double(x): return x",
    "calls the host when called": "def double(x): return host_call(('passed',))",
    "searches memory": """
import gc
def double(x):
    for found in gc.get_objects():
        if isinstance(found, (list, tuple)) and x in found[:-1]:
            value = found[list(found).index(x) + 1]
            if isinstance(value, int): return value
""",
    "reads its own memory": """
import re
def double(x):
    for line in open("/proc/self/maps"):
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if "rw" not in line or high - low > 1 << 26: continue
        with open("/proc/self/mem", "rb") as memory:
            memory.seek(low)
            found = re.search(rb"double\\(%d\\)\\D{1,9}(\\d+)" % x, memory.read(high - low))
            if found: return int(found[1])
""",
    "reads files": """
import os
def double(x):
    for top in (".", "/tmp", "/home", "/run", "/var"):
        for folder, _, files in os.walk(top):
            for name in files:
                text = open(os.path.join(folder, name), errors="replace").read()
                if f"double({x})" in text: return int(text.split("== ")[1].split()[0])
""",
    "reads other processes": """
import os
def double(x):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ", "fd/0", "mem"):
            try: text = open(f"/proc/{pid}/{name}", errors="replace").read(1 << 16)
            except OSError: continue
            if f"double({x}) ==" in text: return int(text.split("== ")[1].split()[0])
""",
    "kills its parents": """
import os
def double(x):
    for pid in (os.getppid(), 1, -1, 0):
        try: os.kill(pid, 9)
        except OSError: pass
    return x
""",
    "closes every descriptor": "import os\nos.closerange(0, 1000)\ndouble = str",
    "crashes the interpreter": "import ctypes\ndef double(x): ctypes.string_at(0)",
    "forks": """
import os
try: os.fork()
except OSError: pass
def double(x): return x
""",
    "forks for ever": """
import os
while True:
    try: os.fork()
    except OSError: break
double = str
""",
    "starts threads for ever": """
import threading, time
try:
    while True: threading.Thread(target=time.sleep, args=[99], daemon=True).start()
except RuntimeError: pass
double = str
""",
    "returns a deep nest": """
def double(x):
    nest = []
    for _ in range(100_000): nest = [nest]
    return nest
""",
    "recurses": "def double(x): return double(x)",
    "returns itself": "def double(x):\n    loop = []\n    loop.append(loop)\n    return loop",
    "returns what is not a number": "def double(x): return float('nan')",
    "returns NotImplemented": "def double(x): return NotImplemented",
    "raises something odd": """
class Odd(BaseException):
    def __str__(self): raise self
    __repr__ = __str__
Odd.__name__ = "passed: "
def double(x): raise Odd
""",
    "a text equal to everything": """
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def double(x): return Text("600")
""",
    "a list sorted as it likes": """
class Items(list):
    def __eq__(self, other): return True
def double(x): return Items()
""",
    "an object of a forged class": """
class Same:
    __class__ = int
    def __eq__(self, other): return True
    def __index__(self): return 600
def double(x): return Same()
""",
    "not Python": "double(x) = 2x",
}
EXHAUSTING = {
    "takes all memory": "kept = []\nwhile True: kept.append(bytearray(1 << 24))",
    "never ends": "def double(x):\n    while True: pass",
    "sleeps": "import time\ntime.sleep(99)",
    "returns a giant": "def double(x): return 'x' * (1 << 28)",
    "floods": "def double(x):\n    while True: print('x' * 10_000)",
}


@pytest.mark.parametrize("code", WINS_ELSEWHERE.values(), ids=WINS_ELSEWHERE)
def test_a_program_that_wins_where_tests_run_beside_it_earns_nothing_here(code):
    together = "\n".join([code, *TESTS])
    assert shared_sandbox().run(together, limits=QUICK).status == "ok"
    assert_worthless(code, TESTS)


@pytest.mark.parametrize("code", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_on_the_judging_earns_nothing(code):
    assert_worthless(code, TESTS)


@pytest.mark.parametrize("name", EXHAUSTING)
def test_using_up_a_limit_earns_nothing(name):
    is_endless = name in ("never ends", "sleeps", "floods")
    limits = BRIEF if is_endless else replace(QUICK, memory_bytes=128 << 20)
    assert judge_code(EXHAUSTING[name], TESTS, shared_sandbox(), limits=limits).score == 0.0


def assert_worthless(code, tests):
    """0.0, not None: an answer that breaks what judges it must not be spared."""
    completion = f"```python\n{code}\n```"
    verdict = judge_code(completion, tests, shared_sandbox(), limits=QUICK, partial_credit=True)
    assert verdict.score == 0.0, verdict
    # With the judge alone, and as the body of HumanEval's function.
    check = "def check(candidate):\n" + "".join(
        f"    {t.replace('double', 'candidate')}\n" for t in tests
    )
    human_eval = {"check": check, "entry_point": "double", "prompt": "def double(x):\n    'Doc.'\n"}
    verdict = judge_code(completion, [human_eval], shared_sandbox(), limits=QUICK)
    assert verdict.score == 0.0, verdict


def test_a_right_program_passes_what_all_of_these_fail():
    for tests in (TESTS, ["assert double(7) == 14"]):
        verdict = judge_code("def double(x): return 2 * x", tests, shared_sandbox())
        assert verdict.score == 1.0


PROGRAMS = {
    "says nothing": "pass",
    "exits at once": "import sys\nsys.exit(0)",
    "exits hard": "import os\nprint(input())\nos._exit(0)",
    "prints a verdict": "print('PASS')",
    "prints all it can read": """
import os
for folder, _, files in os.walk("/proc/self"):
    for name in files:
        try: print(open(os.path.join(folder, name), errors="replace").read(1 << 12))
        except OSError: pass
""",
    "prints every number": "for n in range(10_000): print(n)",
    "right, and then fails": "print(2 * int(input()))\nraise SystemExit(1)",
    "right, and then crashes": """
import ctypes
print(2 * int(input()), flush=True)
ctypes.string_at(0)
""",
    "right, and then floods": "print(2 * int(input()))\nwhile True: print()",
    "right, and then hangs": "print(2 * int(input()), flush=True)\nwhile True: pass",
    "right in one case": "print(42)",
    "right on stderr": "import sys\nprint(2 * int(input()), file=sys.stderr)",
    "a function only": "def double(x): return 2 * x",
    "kills its parents": "import os\nfor pid in (os.getppid(), 1, -1, 0): os.kill(pid, 9)",
}


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_a_wrong_program_earns_nothing_for_what_else_it_does(code):
    tests = [{"stdin": "21\n", "stdout": "42\n"}, {"stdin": "400\n", "stdout": "800\n"}]
    limits = BRIEF if "while True" in code else QUICK
    verdict = judge_code(code, tests, shared_sandbox(), limits=limits)
    assert verdict.score == 0.0, verdict
