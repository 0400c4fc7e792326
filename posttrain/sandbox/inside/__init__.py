"""The code that runs inside the cage: the worker process and the processes of its runs.

`posttrain.sandbox.worker` sends the source of these modules, and of `posttrain.sandbox.wire`, to a
bare interpreter. So they import each other, `wire` and the standard library, and nothing else of
ours. What our side imports from here are constants and functions that it needs to start a worker
and to understand its reports.
"""
