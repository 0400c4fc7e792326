"""Running functions that may raise, hang or crash: in threads with a deadline, or in processes.

`deadline` calls a function in a thread, `pool` in processes that can be killed. `worker_main` is
the code of those processes.
"""
