"""How an action is said: a closed set of names as tokens, choices or a token trie."""
