"""A network within one process."""

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from hf_devft.network.participant import Participant
from hf_devft.network.replies import reply_to


class Loopback(Grid):
    """A network without one: each node's participant answers where it stands. Keeps all that has travelled.

    Attributes:
        participants: by node. sent, replied: contents of messages to participants and from them.
    """

    def __init__(self, participants: dict[int, Participant]):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as Flower sets it for a server
        self.participants, self.sent, self.replied = participants, [], []
        self._replies: dict[str, Message] = {}

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_nodes(self):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.participants)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            number = message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            node = message.metadata.dst_node_id
            self.sent.append((node, message.content))
            content = self.answer(node, message.content)
            self.replied.append((node, content))
            self._replies[number] = Message(content, reply_to=message)
            numbers.append(number)
        return numbers

    def answer(self, node, content):
        return reply_to(self.participants[node], content)

    def pull_messages(self, message_ids):
        return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError
