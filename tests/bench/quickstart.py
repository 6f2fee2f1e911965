"""The quickstart as a scene for a lab, and prompts of each of its workloads."""

from tests.bench.site import Scene
from tests.cluster import MODEL, REPOSITORY

SCENE = Scene(REPOSITORY / "examples" / "quickstart", MODEL)
PROMPTS = {
    "code": (
        "def main(argv):\n    ",
        "import os\nimport sys\n\n\ndef read_config(path):\n",
        "    for index, value in enumerate(values):\n        if",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
        "def test_parse_empty(self):\n        result =",
        "    try:\n        with open(filename) as handle:\n",
    ),
    "math": (
        "Question: A farmer has 12 cows and buys 5 more. How many cows does he have now?\nAnswer:",
        "Question: Anna reads 20 pages a day. How many pages does she read in 3 weeks?\nAnswer:",
        "Question: A shirt costs $15 and a hat costs half as much. What do both cost?\nAnswer:",
        "Question: Tom runs 4 miles in 30 minutes. How far does he run in 2 hours?\nAnswer:",
        "Question: There are 24 students in 4 equal groups.",
        "Question: A box holds 8 pens. If Maria has 7 boxes and gives away 10 pens",
    ),
    "dialogue": (
        "User: I need a table for two at",
        "User: Can you find me a train to",
        "User: What is the weather in",
        "User: I would like to book a hotel in",
        "User: Play some music by",
        "User: I need a cab to the airport.\nAssistant:",
    ),
}
