"""HTTP for the server: uvicorn's protocol, which also answers a client that closes its side too early."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HALF_CLOSED = "the client closed its side of the connection before the answer: keep it open until the answer is there"


class HttpProtocol(H11Protocol):
    """A client that has closed its side looks the same whether it has gone or still reads. So its request ends, and
    what has not been answered gets a 400, which only one that still reads will see."""

    def eof_received(self) -> None:
        asked = self.conn.our_state is h11.SEND_RESPONSE  # a request is there, and no part of its response has gone out
        if (asked or self.conn.trailing_data[0]) and not self.transport.is_closing():
            self.send_400_response(HALF_CLOSED)  # and closes
            # The request's own task must not go on with a response.
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
