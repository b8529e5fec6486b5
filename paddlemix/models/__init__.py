"""Models, one folder a family."""

from paddlemix.errors import room_for_paddle

room_for_paddle()
