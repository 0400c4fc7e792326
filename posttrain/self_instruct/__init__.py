"""Instructions made by a model: prompts, parsing, filters, and the two methods that use them.

    method = Alpaca(load_seed_tasks("data/seed_tasks.jsonl"), num_records=100)
    for request, answer in asker.ask(method.next_request):    # asking.py
        method.take(request, answer)
    method.made.records, method.made.rejected

Alpaca asks for whole tasks, 20 a request, with seeds as the only examples. Self-Instruct asks for
instructions, then for each one's type, then for instances. The teacher that is asked is a server
(server.py), a model on this machine (local.py) or a recording (log.py).
"""

from posttrain.self_instruct.methods import Alpaca, SelfInstruct
from posttrain.self_instruct.tasks import Task, load_seed_tasks

__all__ = ["Alpaca", "SelfInstruct", "Task", "load_seed_tasks"]
