"""The measurements that started this project, made again: `python -m bench tables`.

Two TVMs cannot live in one process. So each has a worker (`relay_worker`, `relax_worker`) that
builds engines and samples them when it is asked; `workers` asks both in turn, so that one run of a
table sees the same machine.
"""
