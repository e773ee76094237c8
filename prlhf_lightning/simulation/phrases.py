"""Phrases of the style grammar: requests, tips, and the wordings of each style.

Every tip is a verb phrase in the base form, so it fits every frame. Texts have only words, single spaces and the marks
`. , ! ?`, so a word-level tokenizer encodes and decodes them without loss.
"""

from __future__ import annotations

REQUESTS = (
    "How do I {topic}?",
    "How can I {topic}?",
    "What helps to {topic}?",
    "Help me {topic}.",
    "Any tips to {topic}?",
    "I want to {topic}.",
)

# topic -> its tips: two for the first position, two for the second, two for the third
TIPS: dict[str, tuple[str, ...]] = {
    "sleep better": (
        "skip late coffee",
        "put the phone away",
        "keep the room dark",
        "open a window",
        "go to bed early",
        "read a calm book",
    ),
    "bake bread": (
        "use warm water",
        "weigh the flour",
        "knead the dough well",
        "add enough salt",
        "let it rise twice",
        "preheat the oven",
    ),
    "learn Spanish": (
        "practice every day",
        "listen to the radio",
        "talk to a neighbor",
        "learn ten words daily",
        "read short stories",
        "repeat aloud",
    ),
    "save money": (
        "write a budget",
        "cook at home",
        "cancel old subscriptions",
        "buy used things",
        "set a weekly limit",
        "compare prices",
    ),
    "give a speech": (
        "start with a story",
        "practice aloud",
        "speak slowly",
        "look at the audience",
        "keep it short",
        "breathe deeply",
    ),
    "grow tomatoes": (
        "find a sunny spot",
        "use rich soil",
        "water the roots",
        "tie up the stems",
        "remove weak leaves",
        "pick them ripe",
    ),
    "run faster": (
        "buy good shoes",
        "warm up first",
        "take short steps",
        "run up hills",
        "train with a friend",
        "rest between runs",
    ),
    "cook rice": (
        "rinse it well",
        "measure the water",
        "cover the pot",
        "lower the heat",
        "let it rest",
        "add a little salt",
    ),
    "stay calm": (
        "breathe deeply",
        "count to ten",
        "take a walk",
        "listen to music",
        "drink some water",
        "talk to a friend",
    ),
    "clean windows": (
        "avoid direct sun",
        "use warm water",
        "add some vinegar",
        "wipe from the top",
        "change the water",
        "dry with a cloth",
    ),
    "make good tea": (
        "warm the pot",
        "use fresh water",
        "buy loose leaves",
        "wait three minutes",
        "pour the milk last",
        "cover the cup",
    ),
    "find a job": (
        "update your resume",
        "learn a new skill",
        "ask old colleagues",
        "write a clear letter",
        "apply every day",
        "prepare for interviews",
    ),
    "train a puppy": (
        "reward good behavior",
        "keep sessions short",
        "stay patient",
        "use simple words",
        "practice every day",
        "take a long walk",
    ),
    "plan a trip": (
        "book early",
        "compare prices",
        "write a budget",
        "leave free days",
        "check the weather",
        "pack light",
    ),
    "paint a room": (
        "clean the walls",
        "cover the floor",
        "use a good brush",
        "start at the top",
        "paint two coats",
        "open a window",
    ),
    "host a dinner": (
        "plan a simple menu",
        "ask about allergies",
        "cook ahead",
        "set the table early",
        "light some candles",
        "play soft music",
    ),
    "read more books": (
        "carry a book",
        "join a library",
        "put the phone away",
        "read before bed",
        "choose fun titles",
        "set a daily goal",
    ),
    "wake up early": (
        "go to bed early",
        "set one alarm",
        "open the curtains",
        "skip late coffee",
        "plan a good breakfast",
        "move the alarm away",
    ),
    "take better photos": (
        "use morning light",
        "move closer",
        "hold the camera still",
        "clean the lens",
        "choose a simple background",
        "take many shots",
    ),
    "eat healthier": (
        "cook at home",
        "eat more vegetables",
        "drink some water",
        "plan a simple menu",
        "eat slowly",
        "carry some fruit",
    ),
}

# Keys are attribute values of a Style; each tuple holds interchangeable wordings.
OPENINGS = {
    "casual": ("Great question!", "Love this one!"),
    "formal": ("Thank you for asking.", "What a thoughtful question."),
}
OFFERS = {
    "casual": ("Want more ideas?", "Need anything else?"),
    "formal": ("May I assist you further?", "Shall I elaborate?"),
}
# (register, certainty) -> wordings of the first, the second and the third tip
FRAMES: dict[tuple[str, str], tuple[tuple[str, ...], ...]] = {
    ("casual", "sure"): (
        ("Just {tip}.", "You gotta {tip}."),
        ("Then {tip}.", "Also {tip}."),
        ("Oh, and {tip}.",),
    ),
    ("casual", "careful"): (
        ("Maybe {tip}.", "You could {tip}."),
        ("Or maybe {tip}.", "Could also {tip}."),
        ("I guess you could {tip}.",),
    ),
    ("formal", "sure"): (
        ("It is essential to {tip}.", "One must {tip}."),
        ("Furthermore, {tip}.", "In addition, {tip}."),
        ("Finally, {tip}.",),
    ),
    ("formal", "careful"): (
        ("It may help to {tip}.", "Perhaps one might {tip}."),
        ("One might also {tip}.", "It seems wise to {tip}."),
        ("Possibly, {tip}.",),
    ),
}
