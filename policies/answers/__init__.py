"""How an action is said: a kind of answer is a file here and a line in `KINDS`; `--action_format NAME` selects it."""

from manako.policies.answers.choice import Choice
from manako.policies.answers.kind import AnswerKind
from manako.policies.answers.place import Place
from manako.policies.answers.token import Token
from manako.policies.answers.trie import Trie

# in the order that `auto` tries
KINDS: dict[str, AnswerKind] = {"token": Token(), "place": Place(), "choice": Choice(), "trie": Trie()}
