"""One Ray node of a cluster on this machine, as a process: `python -m nsa_dist.launch.node '{…}'`.

Not `ray start`: that joins a cluster only on addresses that other machines reach. Its environment holds
RAY_SETTINGS and the token.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.utils import write_ray_address

from nsa_dist.processes import kill_tree


def main(options: dict[str, Any]) -> None:
    """Starts the node, prints where it is as a line of JSON, and ends, with all of its processes, on SIGTERM.

    options: name, cpus, gpus, object_store_bytes, folder; gcs, the head's address, or "" in the head itself, at
    gcs_port (0: any);
    dashboard_port, 0: any; follow: it ends too when its standard input does, which the process that started it
    holds.
    """
    head = not options["gcs"]
    params = RayParams(
        gcs_address=options["gcs"] or None,
        num_cpus=options["cpus"],
        num_gpus=options["gpus"],
        object_store_memory=options["object_store_bytes"],
        node_ip_address="127.0.0.1",
        node_name=options["name"],
        temp_dir=options["folder"],
        # Of its own: a node that unpacks a job's package removes the folder in which those of others run.
        runtime_env_dir_name=f"runtime-{options['name']}",
        include_dashboard=head,
        dashboard_port=options["dashboard_port"],
        gcs_server_port=options["gcs_port"] if head else None,
        # Ports that the system chooses: nodes share the machine.
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
    )
    node = Node(params, head=head, shutdown_at_exit=True, spawn_reaper=True)
    if head:  # where a job finds it, also with other clusters on this machine
        write_ray_address(node.gcs_address, node.get_temp_dir_path())
    facts = {"gcs": node.gcs_address, "dashboard": f"http://{node.webui_url}", "node_id": node.node_id}
    print(json.dumps(facts), flush=True)

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    if options["follow"]:
        threading.Thread(target=_wait_for_end_of_input, args=(ended,), daemon=True).start()
    while not ended.wait(0.5) and not node.dead_processes():
        pass
    kill_tree(os.getpid())  # Ray's own way leaves its agents for a minute
    if head and options["follow"]:  # nobody is left to do it
        time.sleep(1)  # the other nodes end too
        shutil.rmtree(options["folder"], ignore_errors=True)


def _wait_for_end_of_input(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)  # Ray's hooks print
