"""Time all probes of a preset at the classifier's input of one model, features included once, and say what they read.

The data are not part of the project; any labelled images do.

python examples/mobilenet_v2_imagenet.py --output-dir runs/mobilenet_v2 --image-size 160
python examples/audit_probes.py --model runs/mobilenet_v2 --train cars/train.parquet --test cars/test.parquet
"""

import argparse
import time
from dataclasses import replace

from hf_immunize import audit
from hf_immunize.attacks.presets import find_preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub name of an image classifier.")
    parser.add_argument("--train", required=True, help="Labelled images to learn from.")
    parser.add_argument("--test", required=True, help="Labelled images to measure on.")
    parser.add_argument("--preset", default="standard", help="quick, standard or full.")
    arguments = parser.parse_args()
    probes_alone = replace(
        find_preset(arguments.preset), layer_probes=(), flattened_probes=(), fine_tuning=(), restoring=()
    )
    wall, cpu = time.perf_counter(), time.process_time()
    data = audit(arguments.model, harmful=(arguments.train, arguments.test), preset=probes_alone).data
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    groups: dict[tuple[str, str], list] = {}
    for one in data.outcomes:
        groups.setdefault((one.attacker, one.precision), []).append(one)
    print(f"{'attacker':22}{'precision':11}{'accuracy, mean over seeds':28}{'seconds':>8}")
    for (attacker, precision), runs in groups.items():
        done = [one.accuracy for one in runs if one.status == "done"]
        mean = f"{sum(done) / len(done):.1%} (of {len(done)} seeds)" if done else "diverged"
        print(f"{attacker:22}{precision:11}{mean:28}{sum(one.seconds for one in runs):8.1f}")
    print(f"{data.tasks['harmful']}\nIn all {wall:.0f} s wall-clock, {cpu:.0f} s of CPU; {data.machine}")


if __name__ == "__main__":
    main()
