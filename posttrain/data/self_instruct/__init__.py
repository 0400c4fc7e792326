"""Instructions made by a model: prompts, parsing, filters, and the two methods that use them.

    method = Alpaca(load_seed_tasks("data/seed_tasks.jsonl"), num_records=100)
    for request, answer in asker.ask(method.next_request):    # posttrain.teachers
        method.take(request, answer)
    method.made.records, method.made.rejected

Alpaca asks for whole tasks, 20 a request, with seeds as the only examples (alpaca.py).
Self-Instruct asks for instructions, then for each one's type, then for instances (bootstrap.py).
"""

from posttrain.data.self_instruct.alpaca import Alpaca
from posttrain.data.self_instruct.bootstrap import SelfInstruct
from posttrain.data.self_instruct.tasks import Task, load_seed_tasks

__all__ = ["Alpaca", "SelfInstruct", "Task", "load_seed_tasks"]
