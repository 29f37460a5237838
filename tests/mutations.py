"""What `tests.mutants` breaks in the section Routing, in the order of the script."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One place that is broken on purpose."""

    name: str  # What is broken.
    before: str  # Stands once in Routing.
    after: str


MUTATIONS = [
    # Bounds and times.
    Mutation(
        "an ended session is forgotten after a day",
        "SESSION_SECONDS = 7 * DAY",
        "SESSION_SECONDS = DAY",
    ),
    Mutation(
        "the proxy's ids begin where Unix time is",
        "FIRST_PROXY_ID = 2_000_000_000",
        "FIRST_PROXY_ID = 1_800_000_000",
    ),
    # Memory.
    Mutation(
        "kept events are not owed to anybody",
        "return any(self.stored.values()) or any(session.kept for session in self.sessions.values())",
        "return any(self.stored.values())",
    ),
    Mutation(
        "an open session does not keep its charger in memory",
        "return self.is_in_use or is_open or any(self.stored.values())",
        "return self.is_in_use or any(self.stored.values())",
    ),
    Mutation(
        "a session stays where it was when the two servers are swapped",
        "            session.owner = owner\n",
        "",
    ),
    Mutation(
        "the disk does not hear that a session has followed its server",
        "            session.owner = owner\n            memory.unsaved[session] = None\n",
        "            session.owner = owner\n",
    ),
    Mutation(
        "stored Calls that follow their server lose their order",
        "sorted(stored, key=lambda kept: (kept[1].number == 0, kept[1].number))",
        "reversed(stored)",
    ),
    Mutation(
        "stored Calls for a server that the ini no longer names are lost",
        "        memory.stored.setdefault(place(peer, call.server) or peer, []).append(call)",
        "        if there := place(peer, call.server):\n"
        "            memory.stored.setdefault(there, []).append(call)",
    ),
    Mutation(
        "a claim does not follow its server",
        "        replace(claim, peer=there)\n",
        "        claim\n",
    ),
    Mutation(
        "a request does not follow its server",
        "{key: replace(asked, peer=peer) for key, asked, peer in moves if peer}",
        "{key: asked for key, asked, peer in moves if peer}",
    ),
    Mutation(
        "a request outlives the server that asked",
        "{key: replace(asked, peer=peer) for key, asked, peer in moves if peer}",
        "{key: replace(asked, peer=peer or asked.peer) for key, asked, peer in moves}",
    ),
    # What ids, answers and badges mean.
    Mutation(
        "the highest id of the proxy is taken for a server's",
        "FIRST_PROXY_ID <= value <= MAX_ID",
        "FIRST_PROXY_ID <= value < MAX_ID",
    ),
    Mutation(
        "the lowest bit of the proxy's ids is read the wrong way round",
        "return Peer.SECONDARY if transaction_id & 1 else Peer.PRIMARY",
        "return Peer.PRIMARY if transaction_id & 1 else Peer.SECONDARY",
    ),
    Mutation(
        "a stop without a session is not stored",
        "return Kind.STORED if session or content.facts.role is Role.STOP else Kind.NOTED",
        "return Kind.STORED if session else Kind.NOTED",
    ),
    Mutation(
        "an Authorize is stored for ever",
        "return Kind.STORED if session or content.facts.role is Role.STOP else Kind.NOTED",
        "return Kind.STORED",
    ),
    Mutation(
        "a table that is full loses its newest entry",
        "del table[next(iter(table))]",
        "del table[next(reversed(table))]",
    ),
    Mutation(
        "the verdict on a 2.x token is not read",
        'for name in ("idTagInfo", "idTokenInfo"):',
        'for name in ("idTagInfo",):',
    ),
    # Whose a Call is.
    Mutation(
        "the secondary gets no copies",
        "self._dispatched(message, said, route, now) + self._copies(message, said, route)",
        "self._dispatched(message, said, route, now)",
    ),
    Mutation(
        "a claim counts for more than a transaction",
        "            self._by_transaction(said)\n            or self._by_claim(said, now)\n",
        "            self._by_claim(said, now)\n            or self._by_transaction(said)\n",
    ),
    Mutation(
        "the badge lists count for more than a remote start, for an Authorize",
        "            or self._by_claim(said, now)\n            or self._by_badge(said)\n",
        "            or self._by_badge(said)\n            or self._by_claim(said, now)\n",
    ),
    Mutation(
        "meter values do not belong to the session on their connector",
        "            or self._by_connector(said)\n",
        "",
    ),
    Mutation(
        "reports do not go to the server that asked",
        "            or self._by_request(said, now)\n",
        "",
    ),
    Mutation(
        "a report on transactions of both servers goes to one of them",
        "if len(owners) > 1:",
        "if len(owners) > 2:",
    ),
    Mutation(
        "an unknown transaction is guessed by its badge",
        "        if usable and not sessions:\n            return self._by_lost_id(usable[0])\n",
        "",
    ),
    Mutation(
        "a forgotten session of the secondary is taken for the primary's",
        "owner = owner_of_proxy_id(transaction_id)",
        "owner = Peer.PRIMARY",
    ),
    Mutation(
        "messages of a forgotten session are delivered under an id that its server never heard",
        'session.refused, session.is_undeliverable = "its start is not known here", True',
        'session.refused, session.is_undeliverable = "its start is not known here", False',
    ),
    Mutation(
        "a stop of 0 that is repeated ends another session",
        '            ([session for session in sessions if session.stop == stop], "it repeats a stop"),\n',
        "",
    ),
    Mutation(
        "a stop without an id ends the session of another badge",
        "            ([s for s in opened if badge and normalized(s.badge) == badge], "
        '"the open session of its badge"),\n',
        "",
    ),
    Mutation(
        "a stop without an id is that of a session of its badge whose stop was lost",
        "            ([s for s in plugged if badge and normalized(s.badge) == badge], "
        '"the last session of its badge"),\n',
        "",
    ),
    Mutation(
        "a stop without an id goes to the primary where a stop was lost",
        '            (plugged, "the only open session on a connector"),\n',
        "",
    ),
    Mutation(
        "a stop of -1 ends a session that has its id",
        '            ([s for s in opened if s.start and not s.is_told], "the only one whose start '
        'was never answered"),\n',
        "",
    ),
    Mutation(
        "a session that was rejected keeps a stop from the only accepted one",
        '            (accepted, "the only open session"),\n',
        "",
    ),
    Mutation(
        "of several sessions the first is taken for the one that stops",
        "if len(found) == 1 and found[0].owner:",
        "if found and found[0].owner:",
    ),
    # Claims.
    Mutation(
        "a remote start is known by the number that its server gave it, not by the charger's",
        "claim.remote_start is not None and claim.remote_start[0] == said.remote_start",
        "claim.remote_start is not None and claim.remote_start[1] == said.remote_start",
    ),
    Mutation(
        "a reservation does not match a group's other badge",
        "if badge is None or (said.reservation is not None and claim.reservation == said.reservation):",
        "if badge is None:",
    ),
    Mutation(
        "a remote start's number counts without its badge",
        "return claim.badge == normalized(badge) and (",
        "return (is_named(claim) or claim.badge == normalized(badge)) and (",
    ),
    Mutation(
        "a claim knows its badge only in the same letters",
        "return claim.badge == normalized(badge) and (",
        "return claim.badge == badge and (",
    ),
    Mutation(
        "a claim for one connector matches on the other",
        "connector is None or claim.connector in (None, connector)",
        "connector is None or claim is not None",
    ),
    Mutation(
        "the end of a reservation is reported to a server that did not make it",
        "seconds = now.seconds - (RESERVATION_SECONDS if reports else 0.0)",
        "seconds = now.seconds",
    ),
    Mutation(
        "an expired reservation still claims sessions",
        "seconds = now.seconds - (RESERVATION_SECONDS if reports else 0.0)",
        "seconds = now.seconds - RESERVATION_SECONDS",
    ),
    Mutation(
        "a claim never expires",
        "for claim in reversed(self.memory.claims) if seconds < claim.until and matches(claim)]",
        "for claim in reversed(self.memory.claims) if matches(claim)]",
    ),
    Mutation(
        "of two claims the oldest wins",
        "for claim in reversed(self.memory.claims) if seconds",
        "for claim in self.memory.claims if seconds",
    ),
    Mutation(
        "the newest claim wins over the one that is named",
        "for claim in sorted(live, key=is_named, reverse=True):",
        "for claim in live:",
    ),
    # Badges, connectors, requests.
    Mutation(
        "a badge of a secondary that the ini does not name goes to it",
        "if peer is Peer.PRIMARY or (peer and self.config.secondary):",
        "if peer:",
    ),
    Mutation(
        "a badge on no list is taken in where the ini says reject",
        'return Route(Peer.PRIMARY, "its badge is on no list", is_rejected=True)',
        'return Route(Peer.PRIMARY, "its badge is on no list")',
    ),
    Mutation(
        "unknown_rfid = secondary sends strangers to the primary",
        'return Route(Peer.SECONDARY, "its badge is on no list: unknown_rfid = secondary")',
        'return Route(Peer.PRIMARY, "its badge is on no list: unknown_rfid = secondary")',
    ),
    Mutation(
        "a list does not vouch for its badges",
        'return Route(peer, f"its badge is on {peer.value}_rfid", is_vouched=True)',
        'return Route(peer, f"its badge is on {peer.value}_rfid")',
    ),
    Mutation(
        "a claim does not vouch for its badge",
        'claimed it: {why}", claim=claim, is_vouched=True)',
        'claimed it: {why}", claim=claim)',
    ),
    Mutation(
        "a report on an EVSE goes to the owner of the session there",
        "if not said.facts.by_connector or said.connector is None:",
        "if said.connector is None:",
    ),
    Mutation(
        "a request never expires",
        "        if asked and now.seconds < asked.until:\n            return Route(asked.peer",
        "        if asked:\n            return Route(asked.peer",
    ),
    Mutation(
        "a report on an unknown request goes to the server that asked last",
        "if last and said.request is None:",
        "if last:",
    ),
    Mutation(
        "an id that is written as text is not known",
        "            value = int(value)\n",
        "            value = str(value)\n",
    ),
    Mutation(
        "0 is taken for a usable transaction id",
        "return value if 1 <= value <= MAX_ID else None",
        "return value if 0 <= value <= MAX_ID else None",
    ),
    Mutation(
        "an id that chargers cannot write is taken for a usable one",
        "return value if 1 <= value <= MAX_ID else None",
        "return value if value >= 1 else None",
    ),
    # Who answers, and who gets the Call.
    Mutation(
        "a Call for a rejected badge is relayed",
        'if route.is_rejected or self._address(route.owner) in ("", LOCAL):',
        'if self._address(route.owner) in ("", LOCAL):',
    ),
    Mutation(
        "a session of a server that has gone is relayed to its successor",
        "if session and (session.is_rejected or not self._is_here(session)):",
        "if session and session.is_rejected:",
    ),
    Mutation(
        "the rest of a rejected session is relayed",
        "if session and (session.is_rejected or not self._is_here(session)):",
        "if session and not self._is_here(session):",
    ),
    Mutation(
        "a session that its server has forgotten is relayed under the proxy's id",
        "        if session and session.is_undeliverable and is_proxy_id(session.transaction_id):\n"
        "            return False\n",
        "",
    ),
    Mutation(
        "the secondary's verdict is always relayed",
        'return route.owner is Peer.PRIMARY or self.config.secondary_replies == "forward"',
        "return True",
    ),
    Mutation(
        "the secondary's verdict is never relayed",
        'return route.owner is Peer.PRIMARY or self.config.secondary_replies == "forward"',
        "return route.owner is Peer.PRIMARY",
    ),
    Mutation(
        "a rejected session is delivered",
        "        if route.is_rejected or (session and session.is_rejected):\n            return False\n",
        "",
    ),
    Mutation(
        "a session is delivered by the address of today",
        "address = session.server if session and session.server else self._address(route.owner)",
        "address = self._address(route.owner)",
    ),
    Mutation(
        "a repeated stop is stored twice",
        "if session and session.is_stop_stored and said.facts.role is Role.STOP:",
        "if session and session.is_rejected and said.facts.role is Role.STOP:",
    ),
    Mutation(
        "a repeated stop is answered before the first is on disk",
        '"repeats a stop", After.SAVED,',
        '"repeats a stop", After.NOTHING,',
    ),
    Mutation(
        "the rest of a rejected session is accepted",
        "answer = self._answer(said, session, not is_rejected, now)",
        "answer = self._answer(said, session, not route.is_rejected, now)",
    ),
    Mutation(
        "a stored Call is answered before it is on disk",
        "after = After.SAVED if kind is Kind.STORED else After.NOTHING",
        "after = After.NOTHING",
    ),
    Mutation(
        "a start in flight is not known to its session",
        "            if session and said.facts.role is Role.START:\n"
        "                session.start_call = call\n",
        "",
    ),
    Mutation(
        "the first reading of a session is overwritten by the last",
        "session.meter_start = register if session.meter_start is None else session.meter_start",
        "session.meter_start = register",
    ),
    Mutation(
        "a relayed Call tells nothing of its session",
        "        if session:\n            self._note(session, said)\n",
        "        if session and not self._is_relayed(route):\n            self._note(session, said)\n",
    ),
    # The Call as its server gets it.
    Mutation(
        "a report bears the charger's request id",
        "text = patch(text, (3, *said.facts.request), asked.request_id)",
        "text = patch(text, (3, *said.facts.request), said.request)",
    ),
    Mutation(
        "a stored Call is bound to no address",
        "call.server = (route.session and route.session.server) or self._address(route.owner)",
        'call.server = (route.session and route.session.server) or ""',
    ),
    Mutation(
        "a Call of a session is bound to the address of today",
        "call.server = (route.session and route.session.server) or self._address(route.owner)",
        "call.server = self._address(route.owner)",
    ),
    Mutation(
        "a stored Call forgets its version",
        "        call.version = self.version\n        if kind",
        "        if kind",
    ),
    Mutation(
        "a Call forgets that its badge is vouched for",
        "call.session, call.is_vouched = route.session, route.is_vouched",
        "call.session = route.session",
    ),
    Mutation(
        "a stored Call keeps the charger's message id",
        "            call.message_id = new_message_id()\n"
        "            call.text = with_message_id(text, call.message_id)\n",
        "            call.text = text\n",
    ),
    # The proxy's own answers.
    Mutation(
        "a stored start gets no transaction id",
        "            self._name(session, self._new_transaction_id(session.owner))\n        has_badge",
        "            pass\n        has_badge",
    ),
    Mutation(
        "the proxy accepts whom it should refuse",
        'Fill.STATUS: "Accepted" if accepted else "Invalid",',
        'Fill.STATUS: "Accepted",',
    ),
    Mutation(
        "an event without a badge gets a verdict on one",
        "filled(facts.badge_answer if has_badge else facts.answer, values)",
        "filled(facts.badge_answer or facts.answer, values)",
    ),
    Mutation(
        "what the charger was told of a stored start is forgotten",
        "session.start_answer, session.is_told = answer, True",
        "session.is_told = True",
    ),
    Mutation(
        "a stop that was answered here is not remembered",
        "            session.is_stop_stored = True\n",
        "            pass\n",
    ),
    Mutation(
        "an event that was answered here is not remembered",
        "            session.seen.extend(() if number is None else (number,))\n",
        "            pass\n",
    ),
    Mutation(
        "the disk does not hear what a session was answered",
        "        if session and facts.role is not Role.PLAIN:\n            self._save(session)\n",
        "",
    ),
    # What is remembered of the station.
    Mutation(
        "a session that sends meter values counts as silent",
        "        if session:\n            session.touched = now.seconds\n",
        "",
    ),
    Mutation(
        "the disk does not hear of a boot",
        "self.memory.boot, self.memory.is_unsaved = message.text, True",
        "self.memory.boot = message.text",
    ),
    Mutation(
        "a stop does not end its session",
        "            return [self._end(session, now)]\n        elif said.badge",
        "            return []\n        elif said.badge",
    ),
    Mutation(
        "a status keeps the place of the first of its connector",
        "        statuses.pop(where, None)\n",
        "",
    ),
    Mutation(
        "the disk does not hear of a status",
        "statuses[where], self.memory.is_unsaved = message.text, True",
        "statuses[where] = message.text",
    ),
    Mutation(
        "all connectors share one status",
        'where = fingerprint([said.connector, said.payload.get("connectorId")])',
        'where = fingerprint([said.payload.get("status")])',
    ),
    Mutation(
        "a session keeps a connector that is free again",
        'if said.connector in self.memory.connectors and said.state == "Available":',
        'if said.connector in self.memory.connectors and said.state == "Unavailable":',
    ),
    Mutation(
        "any status but Available frees the connector as well",
        'if said.connector in self.memory.connectors and said.state == "Available":',
        "if said.connector in self.memory.connectors:",
    ),
    Mutation(
        "what belongs to a server is copied to the other",
        "if not route.is_station or secondary is None or secondary.is_local:",
        "if secondary is None or secondary.is_local:",
    ),
    Mutation(
        "the secondary hears of no boot",
        "        if said.facts.role is Role.BOOT:\n            return [ToServer(Peer.SECONDARY, "
        'self._call(Kind.OWN, message, said, route), "is a boot")]\n',
        "",
    ),
    Mutation(
        "everything is copied",
        "if message.action in self.config.secondary_copies:",
        "if message.action:",
    ),
    # Sessions of OCPP 1.6.
    Mutation(
        "a start after the stop is taken for a repeat",
        "if session.start == start and session.ended is None and session.owner:",
        "if session.start == start and session.owner:",
    ),
    Mutation(
        "a repeated start is stored twice",
        "if session.start == start and session.ended is None and session.owner:",
        "if session.start == start and session.ended is None and session.is_rejected:",
    ),
    Mutation(
        "a start that was refused cannot be tried again",
        "                if not self._is_refused(session):\n                    return self._repeated_start",
        "                if session.start:\n                    return self._repeated_start",
    ),
    Mutation(
        "a session that was refused stays open when its start is tried again",
        "                self._end(session, now)  # Tried again",
        "                pass  # Tried again",
    ),
    Mutation(
        "the badge lists count for more than a remote start, for a StartTransaction",
        "self._by_claim(said, now) or self._by_badge(said) or Route(",
        "self._by_badge(said) or self._by_claim(said, now) or Route(",
    ),
    Mutation(
        "a session is bound to no address",
        "session.is_rejected, session.server = route.is_rejected, self._address(route.owner)",
        "session.is_rejected = route.is_rejected",
    ),
    Mutation(
        "a session forgets that it is rejected",
        "session.is_rejected, session.server = route.is_rejected, self._address(route.owner)",
        "session.server = self._address(route.owner)",
    ),
    Mutation(
        "a session forgets that its badge is vouched for",
        "        session.is_vouched = route.is_vouched\n        self._keep(session)\n",
        "        self._keep(session)\n",
    ),
    Mutation(
        "the proxy's own refusal counts as the owner's",
        'return session.has_verdict and verdict(session.start_answer or {}) not in (None, "Accepted")',
        'return verdict(session.start_answer or {}) not in (None, "Accepted")',
    ),
    Mutation(
        "an answer without a verdict counts as a refusal",
        'return session.has_verdict and verdict(session.start_answer or {}) not in (None, "Accepted")',
        'return session.has_verdict and verdict(session.start_answer or {}) != "Accepted"',
    ),
    Mutation(
        "the charger is not known to have heard an id that it was told again",
        "            session.is_told = True\n            self._save(session)\n"
        "            text = result_text(message.message_id, session.start_answer)\n",
        "            self._save(session)\n"
        "            text = result_text(message.message_id, session.start_answer)\n",
    ),
    Mutation(
        "a repeated start is answered before the first is on disk",
        "after = After.SAVE if session.has_verdict else After.SAVED\n",
        "after = After.NOTHING\n",
    ),
    Mutation(
        "the answer to a start goes to the id of the first try",
        "            session.start_call.reply_to = message.message_id\n",
        "",
    ),
    Mutation(
        "a start in flight is sent a second time when it is repeated",
        "if session.start_call and session.start_call.is_pending:",
        "if session.start_call and not session.start_call.is_pending:",
    ),
    Mutation(
        "a repeated start is vouched for by nobody",
        "route = Route(session.owner, why, session, is_vouched=session.is_vouched)",
        "route = Route(session.owner, why, session)",
    ),
    Mutation(
        "a session takes no connector",
        "        if session.start:\n            self._take_connector(session)\n",
        "",
    ),
    Mutation(
        "a session leaves its claim",
        "            self.memory.claims.remove(route.claim)\n",
        "",
    ),
    Mutation(
        "the disk does not hear that a claim is used up",
        "            self.memory.claims.remove(route.claim)\n            self.memory.is_unsaved = True\n",
        "            self.memory.claims.remove(route.claim)\n",
    ),
    Mutation(
        "a session that has ended keeps its connector",
        "        session.ended = now.seconds\n        self._leave_connector(session)\n",
        "        session.ended = now.seconds\n",
    ),
    Mutation(
        "the disk does not hear that a session has ended",
        "        self._leave_connector(session)\n        self._save(session)\n        owner =",
        "        self._leave_connector(session)\n        owner =",
    ),
    Mutation(
        "the disk does not hear of a new session",
        "        self.memory.sessions[session.key] = session\n        self._save(session)\n",
        "        self.memory.sessions[session.key] = session\n",
    ),
    Mutation(
        "the table of sessions has no bound",
        "if len(self.memory.sessions) > MAX_SESSIONS:",
        "if not self.memory.sessions:",
    ),
    Mutation(
        "beyond the bound an open session goes before one that has ended",
        "self._forget(self.memory.sessions[next(ended, next(iter(self.memory.sessions)))])",
        "self._forget(self.memory.sessions[next(iter(self.memory.sessions))])",
    ),
    Mutation(
        "a session that is forgotten keeps its connector",
        "        self.memory.sessions.pop(session.key, None)\n        self._leave_connector(session)\n",
        "        self.memory.sessions.pop(session.key, None)\n",
    ),
    Mutation(
        "a session that left memory is no longer saved",
        "if session.number or self.memory.sessions.get(session.key) is session:",
        "if self.memory.sessions.get(session.key) is session:",
    ),
    Mutation(
        "a stand-in for a forgotten session is saved as one",
        "if session.number or self.memory.sessions.get(session.key) is session:",
        "if session is not None:",
    ),
    Mutation(
        "a session takes connector 0, which is the whole station",
        "if session.connector is not None and session.connector > 0:",
        "if session.connector is not None:",
    ),
    Mutation(
        "the disk does not hear that another session took the connector",
        "            if before:\n                self._leave_connector(before)\n",
        "",
    ),
    Mutation(
        "the disk does not hear which connector a session took",
        "            self.memory.connectors[session.connector] = session\n            self._save(session)\n",
        "            self.memory.connectors[session.connector] = session\n",
    ),
    Mutation(
        "an old session that ends takes the connector from the one that stands there",
        "self.memory.connectors.get(session.connector) is session:",
        "session.connector in self.memory.connectors:",
    ),
    Mutation(
        "the disk does not hear that a session has left its connector",
        "            del self.memory.connectors[session.connector]\n            self._save(session)\n",
        "            del self.memory.connectors[session.connector]\n",
    ),
    Mutation(
        "a session stays to be found by its start as well",
        "        self.memory.sessions.pop(session.key, None)\n"
        "        session.transaction_id = transaction_id\n",
        "        session.transaction_id = transaction_id\n",
    ),
    Mutation(
        "the lowest bit of the proxy's ids names the other server",
        "bit = int(owner is Peer.SECONDARY)",
        "bit = int(owner is not Peer.SECONDARY)",
    ),
    Mutation(
        "an id that is in use is given again",
        "            if transaction_id not in self.memory.sessions:\n                return transaction_id\n",
        "            return transaction_id\n",
    ),
    Mutation(
        "the proxy hands out ids below its range",
        "random.randrange(FIRST_PROXY_ID, MAX_ID, 2) + bit",
        "random.randrange(0, FIRST_PROXY_ID, 2) + bit",
    ),
    Mutation(
        "the second answer to a start replaces the first one's id",
        "        if session.server_id is not None:\n            return  #",
        '        if session.server_id == "":\n            return  #',
    ),
    Mutation(
        "an id of the server that is not usable is forgotten",
        "session.server_id = raw if type(raw) is int or type(raw) is str else None",
        "session.server_id = server_id",
    ),
    Mutation(
        "an id that another session bears is told to the charger",
        "is_free = server_id not in self.memory.sessions and not is_proxy_id(server_id)",
        "is_free = not is_proxy_id(server_id)",
    ),
    Mutation(
        "an id from the proxy's range is told to the charger as it is",
        "is_free = server_id not in self.memory.sessions and not is_proxy_id(server_id)",
        "is_free = server_id not in self.memory.sessions",
    ),
    Mutation(
        "a charger that was told an id is told another",
        "        if session.transaction_id is None:\n            is_free",
        "        if session.server_id is not None:\n            is_free",
    ),
    Mutation(
        "an answer with two transaction ids is passed on as it came",
        'if repeated(text, [(2, "transactionId")]):',
        "if False:",
    ),
    Mutation(
        "a late answer to a start tells the session nothing",
        "        if not session.is_told:\n            is_long",
        "        if session.is_told:\n            is_long",
    ),
    Mutation(
        "a start that is repeated is answered with the server's id",
        '{**kept, "transactionId": session.transaction_id}',
        "dict(kept)",
    ),
    # Transactions of OCPP 2.x.
    Mutation(
        "the server is thought to know no id of a 2.x transaction",
        "            session.server_id = transaction_id\n",
        "",
    ),
    Mutation(
        "a 2.x transaction that sends events counts as silent",
        "        session.touched = now.seconds\n        self._occupy(",
        "        self._occupy(",
    ),
    Mutation(
        "an event under the id of an ended transaction is always a repeat",
        "if session is None or self._is_another(session, said):",
        "if session is None:",
    ),
    Mutation(
        "a Started that is repeated after the end begins another transaction",
        "and session.ended is not None and said.timestamp != session.started_at",
        "and session.ended is not None",
    ),
    Mutation(
        "a Started with another time begins another transaction while the first one is open",
        "and session.ended is not None and said.timestamp != session.started_at",
        "and said.timestamp != session.started_at",
    ),
    Mutation(
        "a repeated event is stored twice",
        'if integer(payload.get("seqNo")) is not None and payload["seqNo"] in session.seen:',
        'if integer(payload.get("seqNo")) is None and payload.get("seqNo") in session.seen:',
    ),
    Mutation(
        "events without a number are taken for repeats",
        'if integer(payload.get("seqNo")) is not None and payload["seqNo"] in session.seen:',
        'if payload.get("seqNo") in session.seen:',
    ),
    Mutation(
        "a repeated event of a rejected transaction is accepted",
        "answer = self._answer(said, None, not session.is_rejected, now)",
        "answer = self._answer(said, None, True, now)",
    ),
    Mutation(
        "a repeated event is answered before the first is on disk",
        '"repeats an event", After.SAVED,',
        '"repeats an event", After.NOTHING,',
    ),
    Mutation(
        "the settling event overtakes the kept ones",
        "        decisions += self._dispatched(message, said, route, now)\n        if payload",
        "        decisions = self._dispatched(message, said, route, now) + decisions\n        if payload",
    ),
    Mutation(
        "an event of a transaction with an owner is vouched for by nobody",
        'route = Route(session.owner, "its transaction", session, is_vouched=True)',
        'route = Route(session.owner, "its transaction", session)',
    ),
    Mutation(
        "a 2.x transaction never ends",
        'if payload.get("eventType") == "Ended" and session.ended is None:',
        'if payload.get("eventType") == "Stopped" and session.ended is None:',
    ),
    Mutation(
        "a 2.x transaction that has ended takes its EVSE again",
        "session.connector is None and session.ended is None:",
        "session.connector is None:",
    ),
    Mutation(
        "a 2.x transaction moves to whatever EVSE an event names",
        "session.connector is None and session.ended is None:",
        "session.ended is None:",
    ),
    Mutation(
        "a claim for an EVSE is not asked whether the transaction stands there",
        "        if said.connector is None and session.connector is not None:",
        "        if said.connector is not None and session.connector is not None:",
    ),
    Mutation(
        "the badge lists count for more than a remote start, for a TransactionEvent",
        "route = self._by_claim(said, now) or self._by_badge(said)\n        if route:",
        "route = self._by_badge(said) or self._by_claim(said, now)\n        if route:",
    ),
    Mutation(
        "a transaction that needs no authorization waits for a badge",
        '            (badge_type == "NoAuthorization", "it needs no authorization"),\n',
        "",
    ),
    Mutation(
        "a transaction that charges waits for a badge",
        '            (said.state == "Charging", "it charges without a badge"),\n',
        "",
    ),
    Mutation(
        "a transaction that has ended waits for a badge",
        '            (said.payload.get("eventType") == "Ended", "it ends without a badge"),\n',
        "",
    ),
    Mutation(
        "kept events are not known as such",
        "        call.is_kept = True\n",
        "",
    ),
    Mutation(
        "a kept event is answered before it is on disk",
        "return [ToCharger(result_text(message.message_id, answer), route.why, After.SAVED)]",
        "return [ToCharger(result_text(message.message_id, answer), route.why, After.NOTHING)]",
    ),
    Mutation(
        "an event without an owner is answered and lost",
        "        session.kept.append(call)\n",
        "",
    ),
    Mutation(
        "a transaction that is rejected is taken in",
        "session.owner, session.badge, session.is_rejected = route.owner, badge, route.is_rejected",
        "session.owner, session.badge = route.owner, badge",
    ),
    Mutation(
        "a 2.x transaction is bound to no address",
        "        session.server = self._address(route.owner)\n        self._save(session)\n",
        "        self._save(session)\n",
    ),
    Mutation(
        "the disk does not hear whose a transaction is",
        "        session.server = self._address(route.owner)\n        self._save(session)\n",
        "        session.server = self._address(route.owner)\n",
    ),
    Mutation(
        "a transaction forgets the number of its remote start",
        "            session.remote_start = route.claim.remote_start\n",
        "            pass\n",
    ),
    Mutation(
        "kept events are handed over a second time",
        "kept, session.kept = session.kept, []",
        "kept = session.kept",
    ),
    Mutation(
        "kept events are handed over in reverse order",
        "kept, session.kept = session.kept, []",
        "kept, session.kept = session.kept[::-1], []",
    ),
    Mutation(
        "kept events stay bound to the primary",
        "            call.server, call.version = session.server, self.version\n",
        "            pass\n",
    ),
    Mutation(
        "kept events of a rejected transaction are delivered",
        "        if not self._is_delivered(route._replace(session=session)):\n            return [told]\n",
        "",
    ),
    Mutation(
        "a kept event bears the charger's number of the remote start",
        'ToServer(route.owner, self._restored(call), "was kept for its owner")',
        'ToServer(route.owner, call, "was kept for its owner")',
    ),
    Mutation(
        "a later event bears the charger's number of the remote start",
        "        return self._restored(call)\n",
        "        return call\n",
    ),
    # Answers of the servers.
    Mutation(
        "a server is sent the charger's transaction id",
        "return patch(call.text, (3, *path), session.server_id)",
        "return patch(call.text, (3, *path), session.transaction_id)",
    ),
    Mutation(
        "an answered Call stays pending",
        "        call.is_pending = False\n        words = self.learn(",
        "        words = self.learn(",
    ),
    Mutation(
        "a verdict against a badge is not told",
        "if badge else []",
        "if not badge else []",
    ),
    Mutation(
        "the charger hears the server as well as the proxy",
        '        if call.reply_to is None:\n            return [*told, Dropped("the charger has its',
        '        if message.type is None:\n            return [*told, Dropped("the charger has its',
    ),
    Mutation(
        "the heartbeat interval that the charger was given is not known",
        'integer(message.payload.get("interval")) or HEARTBEAT_INTERVAL\n',
        "HEARTBEAT_INTERVAL\n",
    ),
    Mutation(
        "the disk does not hear of the heartbeat interval",
        'integer(message.payload.get("interval")) or HEARTBEAT_INTERVAL\n'
        "            self.memory.is_unsaved = True\n",
        'integer(message.payload.get("interval")) or HEARTBEAT_INTERVAL\n',
    ),
    Mutation(
        "the charger that hears an id is not known to have heard it",
        "            session.is_told = True\n            self._save(session)\n            if message.payload",
        "            self._save(session)\n            if message.payload",
    ),
    Mutation(
        "a relayed start is answered with the server's id",
        '            text = patch(text, (2, "transactionId"), session.transaction_id)\n',
        "            pass\n",
    ),
    Mutation(
        "the second answer to a start is forwarded with its own id",
        "                text = result_text(call.reply_to, session.start_answer)\n",
        "",
    ),
    Mutation(
        "an answer reaches the charger under an id that it did not ask with",
        "            text = with_message_id(text, call.reply_to)\n        # The charger",
        "            pass\n        # The charger",
    ),
    Mutation(
        "the charger knows of a transaction before the disk does",
        "after = After.SAVE if is_first_word else After.NOTHING",
        "after = After.NOTHING",
    ),
    Mutation(
        "every relayed answer waits for the disk",
        "is_first_word = session is not None and call.content.facts.role in (Role.START, Role.EVENT)",
        "is_first_word = call is not None",
    ),
    Mutation(
        "an answer tells nothing of its session",
        "        if call.session:\n            self._learn_of(call.session, call, message, now)\n",
        "",
    ),
    Mutation(
        "an acceptance that the server took back still counts",
        "        self.memory.accepted.pop((peer, normalized(badge)), None)\n",
        "",
    ),
    Mutation(
        "a badge that was refused counts as accepted",
        '        if status != "Accepted":\n            return f"status {str(status)[:MAX_ACTION]}"\n',
        "",
    ),
    Mutation(
        "a badge that one server accepted is accepted for the other",
        'accepted = self.memory.accepted.get((peer, normalized(badge or "")))',
        "accepted = next((when for (_, one), when in self.memory.accepted.items() if one == "
        'normalized(badge or "")), None)',
    ),
    Mutation(
        "the answer to a stored start counts as the owner's verdict",
        "session.has_verdict = session.has_verdict or call.kind is Kind.RELAYED",
        "session.has_verdict = True",
    ),
    Mutation(
        "a stop that was accepted in the end shows as refused",
        'session.refused = ""  # It was sent again',
        "pass  # It was sent again",
    ),
    Mutation(
        "a stop that was accepted shows as refused by its repeat",
        "and not (session.delivered or session.refused):",
        "and not session.refused:",
    ),
    Mutation(
        "what a server has against a start is not kept",
        "            session.refused = words\n            self._save(session)\n        elif",
        "            pass\n        elif",
    ),
    Mutation(
        "a session does not show that it was delivered",
        "            session.delivered = now.utc\n",
        "            pass\n",
    ),
    Mutation(
        "the disk does not hear that a session was delivered",
        "            session.delivered = now.utc\n            self._save(session)\n",
        "            session.delivered = now.utc\n",
    ),
    Mutation(
        "a stop that was stored before is stored again when the proxy stands in",
        "is_repeat = session is not None and self._is_stored_already(session, call.content)",
        "is_repeat = False",
    ),
    Mutation(
        "meter values whose charger is gone are stored as well as repeated",
        'if is_repeat or (reply_to is None and call.action == "MeterValues"):',
        "if is_repeat:",
    ),
    Mutation(
        "a charger that is gone counts as having heard its start's answer",
        "                session.is_told = False  # Its charger",
        "                pass  # Its charger",
    ),
    Mutation(
        "what the proxy answers as a stand-in is not on disk",
        "after = After.SAVED if call.kind is Kind.STORED or is_repeat else After.NOTHING",
        "after = After.NOTHING",
    ),
    Mutation(
        "a repeat is answered by the stand-in before the first is on disk",
        "after = After.SAVED if call.kind is Kind.STORED or is_repeat else After.NOTHING",
        "after = After.SAVED if call.kind is Kind.STORED else After.NOTHING",
    ),
    Mutation(
        "the stand-in accepts every badge",
        "accepted = self._is_trusted(peer, call, now)",
        "accepted = True",
    ),
    Mutation(
        "the stand-in accepts no badge that a list vouches for",
        "            or call.is_vouched\n",
        "",
    ),
    Mutation(
        "an acceptance never grows old",
        "or (accepted is not None and now.seconds - accepted <= ACCEPTED_SECONDS)",
        "or accepted is not None",
    ),
    Mutation(
        "a start that its owner refused refuses nothing else",
        "session.is_undeliverable = is_error or self._transaction_id(session.server_id) is None",
        "session.is_undeliverable = False",
    ),
    Mutation(
        "a start that its owner refused refuses its session even if it has an id",
        "session.is_undeliverable = is_error or self._transaction_id(session.server_id) is None",
        "session.is_undeliverable = True",
    ),
    Mutation(
        "the disk does not hear that a start was refused",
        "        if session and call.content.is_start:\n            self._save(session)\n",
        "        if session and call.content.is_start:\n",
    ),
    # Calls of the servers.
    Mutation(
        "a server's Call for the other server's transaction is let through",
        "            if why:\n                return [self._refusal(peer, message, said, why)]\n",
        "",
    ),
    Mutation(
        "the secondary may call what the ini refuses it",
        "if message.action in self.config.secondary_refuse:",
        "if False:",
    ),
    Mutation(
        "the secondary may call what moves the charger away",
        '        return f"{message.action}: {setting} is the primary\'s alone" if setting else ""\n',
        '        return ""\n',
    ),
    Mutation(
        "the primary is refused what only the secondary may not",
        'if why := self._forbidden(message) if peer is Peer.SECONDARY else "":',
        "if why := self._forbidden(message):",
    ),
    Mutation(
        "of a setting that is named twice only the last counts",
        "if message.action in SETTING_ACTIONS and repeats_anywhere(message.text):",
        "if False:",
    ),
    Mutation(
        "what repeats a long start is another session",
        "hashlib.sha256(text.encode()).hexdigest()",
        "new_message_id()",
    ),
    Mutation(
        "a badge of any length is kept",
        "            if len(str(value_at(message.payload, path))) > MAX_FIELD:\n",
        "            if False:\n",
    ),
    Mutation(
        "a boot of any length is remembered",
        "        is_short = len(message.text) <= MAX_SELF_DESCRIPTION\n",
        "        is_short = True\n",
    ),
    Mutation(
        "any number of transactions may be without an owner",
        "            (self._ownerless() > MAX_OWNERLESS, ",
        "            (False, ",
    ),
    Mutation(
        "events without an owner may be of any length",
        "            (sum(len(call.text) for call in session.kept) > MAX_KEPT_TEXT, ",
        "            (False, ",
    ),
    Mutation(
        "a Call that there is no room for is answered",
        "        if kind is Kind.STORED and self.memory.is_full:\n            return [FULL]\n",
        "",
    ),
    Mutation(
        "a start that there is no room for is noted",
        "if self.memory.is_full and not self._is_relayed(route):",
        "if False:",
    ),
    Mutation(
        "an event that there is no room for is kept",
        "        if self.memory.is_full:\n            return [FULL]\n",
        "",
    ),
    Mutation(
        "a Call that there is no room for is answered in its server's place",
        "if self.memory.is_full and answered_kind(call.content, session) is Kind.STORED:",
        "if False:",
    ),
    Mutation(
        "Calls that were given up outlive the charger's connection",
        "        self.spent.clear()  # Whatever comes on its next connection answers none of them.\n",
        "",
    ),
    Mutation(
        "an event without a number repeats another without one",
        "        return said.facts.role is Role.EVENT and number is not None and number in session.seen\n",
        "        return said.facts.role is Role.EVENT and number in [None, *session.seen]\n",
    ),
    Mutation(
        "both servers' Calls bear one id at the charger",
        "if call.message_id in self._wire_ids():",
        "if call.message_id in self.memory.claims:",
    ),
    Mutation(
        "the charger gets the id that the proxy did not note",
        "            call.text = with_message_id(call.text, call.wire_id)\n        return self._queued",
        "        return self._queued",
    ),
    Mutation(
        "an Action with an odd character reaches the charger",
        "if not ACTION.fullmatch(message.action):",
        "if not message.action:",
    ),
    Mutation(
        "the Calls of a server that wait have no bound in length",
        "sum(len(other.text) for other in waiting) > MAX_WAITING_TEXT",
        "waiting is None",
    ),
    Mutation(
        "all statuses together have no bound",
        " or sum(map(len, statuses.values())) > MAX_SELF_DESCRIPTION",
        "",
    ),
    Mutation(
        "the Calls of a server that wait have no bound",
        "if len(waiting) >= MAX_WAITING or",
        "if",
    ),
    Mutation(
        "a refusal has no status where the schema has one",
        "        if rejection is not None:\n",
        "        if rejection is None:\n",
    ),
    Mutation(
        "a server's transaction id reaches the charger as it is",
        "                call.text = patch(call.text, (3, *call.content.facts.transaction), "
        "session.transaction_id)\n",
        "                pass\n",
    ),
    Mutation(
        "the transaction of the other server is nobody's",
        '        if other and other.owner is not None:\n            return f"transaction',
        '        if other and other.owner is call.peer:\n            return f"transaction',
    ),
    Mutation(
        "the secondary may name what nobody knows",
        '        if call.peer is Peer.SECONDARY:\n            return f"nobody',
        '        if call.peer is Peer.PROXY:\n            return f"nobody',
    ),
    Mutation(
        "the primary may name nothing that nobody knows",
        '        if call.peer is Peer.SECONDARY:\n            return f"nobody',
        '        if call.peer is not Peer.PROXY:\n            return f"nobody',
    ),
    Mutation(
        "a server's id finds the other server's session",
        "if session.owner is peer and session.server_id is not None and not session.is_rejected",
        "if session.server_id is not None and not session.is_rejected",
    ),
    Mutation(
        "a server's id finds a session that was rejected",
        "if session.owner is peer and session.server_id is not None and not session.is_rejected",
        "if session.owner is peer and session.server_id is not None",
    ),
    Mutation(
        "a new server's id finds the session of its predecessor",
        "            if self._is_here(session)\n",
        "",
    ),
    Mutation(
        "a server that quotes its ids finds no session",
        "if server_id in (session.server_id, self._transaction_id(session.server_id))",
        "if server_id == session.server_id",
    ),
    Mutation(
        "an id that is used again finds the oldest session",
        "return max(found, key=lambda session: (session.ended is None, session.begun), default=None)",
        "return next(iter(found), None)",
    ),
    Mutation(
        "an id that is used again finds a session that has ended",
        "return max(found, key=lambda session: (session.ended is None, session.begun), default=None)",
        "return max(found, key=lambda session: session.begun, default=None)",
    ),
    Mutation(
        "both servers' requests bear one id at the charger",
        "if asked and asked.peer is not call.peer and now.seconds < asked.until:",
        "if asked and asked.peer is call.peer and now.seconds < asked.until:",
    ),
    Mutation(
        "the charger gets the request id that the proxy did not note",
        "            call.text = patch(call.text, (3, *path), call.request_id)\n",
        "",
    ),
    Mutation(
        "the request that another has taken the place of is forgotten",
        "call.asked_before = self.memory.requests.pop(call.request_id, None)",
        "self.memory.requests.pop(call.request_id, None)",
    ),
    Mutation(
        "the server's own request id is forgotten",
        "call.asked = Asked(call.peer, self._address(call.peer), request_id, until)",
        "call.asked = Asked(call.peer, self._address(call.peer), call.request_id, until)",
    ),
    Mutation(
        "the disk does not hear of a request",
        "        self.memory.requests[call.request_id] = call.asked\n        self.memory.is_unsaved = True\n",
        "        self.memory.requests[call.request_id] = call.asked\n",
    ),
    Mutation(
        "a reservation claims nothing",
        "if said.facts.role not in (Role.REMOTE_START, Role.RESERVE) or said.badge is None:",
        "if said.facts.role is not Role.REMOTE_START or said.badge is None:",
    ),
    Mutation(
        "a reservation of the whole station claims connector 0 alone",
        "badge, connector = normalized(said.badge), said.connector or None",
        "badge, connector = normalized(said.badge), said.connector",
    ),
    Mutation(
        "remote starts of both servers bear one number while they wait",
        "            live += [waiting.claim for waiting in calls if waiting.claim]\n",
        "",
    ),
    Mutation(
        "a server's second remote start with one number is translated",
        "other.remote_start[0] for other in live if other.remote_start and other.peer is not call.peer",
        "other.remote_start[0] for other in live if other.remote_start",
    ),
    Mutation(
        "the charger gets the number of a remote start that the proxy did not note",
        "                call.text = patch(call.text, (3, *said.facts.remote_start), "
        "claim.remote_start[0])\n",
        "                pass\n",
    ),
    Mutation(
        "a number that is in use is given again",
        "            if number not in used:\n                return number\n",
        "            return number\n",
    ),
    Mutation(
        "the id of a Call that was given up is used for another",
        "return {call.wire_id for call in calls}.union(self.spent)",
        "return {call.wire_id for call in calls}",
    ),
    Mutation(
        "two Calls are outstanding at once",
        "        if self.outstanding:\n            return []\n        turns",
        "        turns",
    ),
    Mutation(
        "the server that was served last comes first again",
        "key=lambda peer: peer is self.last_served",
        "key=lambda peer: peer is not self.last_served",
    ),
    Mutation(
        "the primary always comes first",
        "key=lambda peer: peer is self.last_served",
        "key=lambda peer: peer is not Peer.PRIMARY",
    ),
    Mutation(
        "the Calls of a server overtake each other",
        "call = self.waiting[peer].popleft()",
        "call = self.waiting[peer].pop()",
    ),
    Mutation(
        "the charger hears of a remote start that a kill would forget",
        "after = After.SAVE if call.claim or call.asked else After.NOTHING",
        "after = After.SAVE if call.asked else After.NOTHING",
    ),
    Mutation(
        "the charger hears of a request that a kill would forget",
        "after = After.SAVE if call.claim or call.asked else After.NOTHING",
        "after = After.SAVE if call.claim else After.NOTHING",
    ),
    Mutation(
        "the charger's call_timeout counts from the queue",
        "self.outstanding, self.last_served, call.sent = call, peer, now.seconds",
        "self.outstanding, self.last_served, call.sent = call, peer, call.queued",
    ),
    Mutation(
        "a claim counts from the queue",
        "call.claim.until = now.seconds + self._claim_seconds(call, now)",
        "call.claim.until = call.queued + self._claim_seconds(call, now)",
    ),
    Mutation(
        "the disk does not hear of a claim",
        "            self.memory.claims.append(call.claim)\n            self.memory.is_unsaved = True\n",
        "            self.memory.claims.append(call.claim)\n",
    ),
    Mutation(
        "the claims have no bound",
        "            del self.memory.claims[:-MAX_CLAIMS]\n",
        "",
    ),
    Mutation(
        "a reservation claims for five minutes",
        "        if call.content.facts.role is not Role.RESERVE:\n",
        "        if call.content.facts.role is Role.RESERVE:\n",
    ),
    Mutation(
        "the expiry date of a 2.x reservation is not read",
        'call.content.payload.get("expiryDate", call.content.payload.get("expiryDateTime"))',
        'call.content.payload.get("expiryDate")',
    ),
    # Answers of the charger.
    Mutation(
        "any answer of the charger is taken for the one that is due",
        "if call is None or call.wire_id != message.message_id:",
        "if call is None:",
    ),
    Mutation(
        "a late refusal of the charger no longer counts",
        "told = self._settle_claim(late, message) if late else []",
        "told: list[Decision] = []",
    ),
    Mutation(
        "a late answer of the charger counts each time that it comes",
        "late = self.spent.pop(message.message_id, None)",
        "late = self.spent.get(message.message_id)",
    ),
    Mutation(
        "an answered Call stays outstanding",
        "self.outstanding, self.last_answered = None, (call.peer,",
        "self.last_answered = (call.peer,",
    ),
    Mutation(
        "a server that is gone is answered on its next connection",
        "if call.is_abandoned or call.peer is Peer.PROXY:",
        "if call.peer is Peer.PROXY:",
    ),
    Mutation(
        "a server is answered under the id that the charger knows",
        "            text = with_message_id(text, call.message_id)\n        if call.content",
        "            pass\n        if call.content",
    ),
    Mutation(
        "the next Call waits although the charger has answered",
        "return [answer, *decisions, *self._next(now)]",
        "return [answer, *decisions]",
    ),
    Mutation(
        "the next Call waits behind one that nobody waited for",
        'does not wait for it"), *self._next(now)]',
        'does not wait for it")]',
    ),
    Mutation(
        "a command's claim is not voided when the charger refuses it",
        'if message.type is MessageType.CALLERROR or not status.startswith("Accepted"):',
        "if message.type is MessageType.CALLERROR:",
    ),
    Mutation(
        "a command's claim is not voided by a CallError",
        'if message.type is MessageType.CALLERROR or not status.startswith("Accepted"):',
        'if not status.startswith("Accepted"):',
    ),
    Mutation(
        "AcceptedCanceled is taken for a refusal",
        'not status.startswith("Accepted"):',
        'status != "Accepted":',
    ),
    Mutation(
        "the disk does not hear who asked last",
        "            self.memory.askers[call.action] = "
        "Asked(call.peer, self._address(call.peer), 0, math.inf)\n"
        "            self.memory.is_unsaved = True\n",
        "            self.memory.askers[call.action] = "
        "Asked(call.peer, self._address(call.peer), 0, math.inf)\n",
    ),
    Mutation(
        "the disk does not hear that a reservation is cancelled",
        "        elif call.content.facts.role is Role.CANCEL:\n            self.memory.is_unsaved = True\n",
        "        elif call.content.facts.role is Role.CANCEL:\n",
    ),
    Mutation(
        "a server cancels the other server's reservation",
        "                if claim.peer is not call.peer\n                or claim.reservation is None\n",
        "                if claim.reservation is None\n",
    ),
    Mutation(
        "a cancelled reservation ends the remote starts as well",
        "                or claim.reservation is None\n",
        "",
    ),
    Mutation(
        "a server gets a transaction that already has an owner",
        "            if session and session.owner is None:\n                badge",
        "            if session:\n                badge",
    ),
    Mutation(
        "the transaction that the charger names in its answer is nobody's",
        "        elif call.claim and call.claim.remote_start:\n",
        "        elif call.claim and call.claim.reservation:\n",
    ),
    Mutation(
        "the disk does not hear of a refusal",
        '        """Undo what a Call has noted that the charger refuses."""\n'
        "        self.memory.is_unsaved = True\n",
        '        """Undo what a Call has noted that the charger refuses."""\n',
    ),
    Mutation(
        "a refused request stays noted",
        "            self.memory.requests.pop(call.request_id)\n",
        "            pass\n",
    ),
    Mutation(
        "a late refusal takes away a newer request",
        "if call.request_id is not None and self.memory.requests.get(call.request_id) is call.asked:",
        "if call.request_id is not None and call.request_id in self.memory.requests:",
    ),
    Mutation(
        "a refused request does not give way to the one before",
        "            if call.asked_before:\n"
        "                self.memory.requests[call.request_id] = call.asked_before\n",
        "",
    ),
    Mutation(
        "a CallResultError of the charger reaches a server that did not answer",
        "if self.last_relayed and self.last_relayed[2] == message.message_id:",
        "if self.last_relayed:",
    ),
    Mutation(
        "a CallResultError of a server bears the server's id at the charger",
        "ToCharger(with_message_id(message.text, self.last_answered[2]), ",
        "ToCharger(message.text, ",
    ),
    Mutation(
        "a CallResultError of the charger bears the charger's id at the server",
        "text = with_message_id(message.text, message_id)\n                return",
        "text = message.text\n                return",
    ),
    Mutation(
        "a CallResultError of the wrong server is let through",
        "self.last_answered[:2] == (sender, message.message_id)",
        "self.last_answered[1] == message.message_id",
    ),
    # Time and lost connections.
    Mutation(
        "a server that is gone hears that its Call was given up",
        "if call.peer is Peer.PROXY or call.is_abandoned:",
        "if call.peer is Peer.PROXY:",
    ),
    Mutation(
        "a Call that the charger leaves unanswered blocks it for ever",
        "            self.outstanding = None\n            self.spent",
        "            self.spent",
    ),
    Mutation(
        "a Call that was given up is not remembered",
        "            self.spent[call.wire_id] = call\n",
        "",
    ),
    Mutation(
        "the server does not hear that the charger left its Call unanswered",
        '            decisions += self._given_up(call, f"the charger did not answer',
        '            self._given_up(call, f"the charger did not answer',
    ),
    Mutation(
        "a Call waits unsent for ever",
        "while waiting and now.seconds >= waiting[0].queued + 2 * self.call_timeout:",
        "while waiting and now.seconds >= waiting[0].queued + 2000 * self.call_timeout:",
    ),
    Mutation(
        "a Call is given up unsent after the time that a sent one has",
        "while waiting and now.seconds >= waiting[0].queued + 2 * self.call_timeout:",
        "while waiting and now.seconds >= waiting[0].queued + self.call_timeout:",
    ),
    Mutation(
        "the next Call waits although the one before was given up",
        "decisions += self.sweep(now)\n        return decisions + self._next(now)",
        "decisions += self.sweep(now)\n        return decisions",
    ),
    Mutation(
        "nothing is ever swept",
        "            decisions += self.sweep(now)\n",
        "",
    ),
    Mutation(
        "nobody wakes for a Call that the charger leaves unanswered",
        "        if self.outstanding:\n            times.append(self.outstanding.sent + self.call_timeout)\n",
        "",
    ),
    Mutation(
        "nobody wakes for a Call that waits unsent",
        "        times += [calls[0].queued + 2 * self.call_timeout for calls in "
        "self.waiting.values() if calls]\n",
        "",
    ),
    Mutation(
        "expired claims stay in memory",
        "[claim for claim in memory.claims if now.seconds < claim.until + RESERVATION_SECONDS]",
        "list(memory.claims)",
    ),
    Mutation(
        "expired requests stay in memory",
        "{key: asked for key, asked in memory.requests.items() if now.seconds < asked.until}",
        "dict(memory.requests)",
    ),
    Mutation(
        "old acceptances stay in memory",
        "for key, when in memory.accepted.items() if now.seconds - when <= ACCEPTED_SECONDS",
        "for key, when in memory.accepted.items()",
    ),
    Mutation(
        "the disk does not hear when an open session was last heard of",
        "                self._save(session)  # So that a restart",
        "                pass  # So that a restart",
    ),
    Mutation(
        "a silent session never counts as ended",
        "if session.ended is None and now.seconds - session.touched > SESSION_SECONDS:",
        "if session.ended is None and session.touched > SESSION_SECONDS + now.seconds:",
    ),
    Mutation(
        "a silent transaction without an owner is ended with what was kept for it",
        "                if session.owner is None:\n                    told +=",
        "                if session.owner is Peer.PROXY:\n                    told +=",
    ),
    Mutation(
        "an ended session is never forgotten",
        "elif session.ended is not None and now.seconds - session.ended > SESSION_SECONDS:",
        "elif session.ended is not None and session.ended > SESSION_SECONDS + now.seconds:",
    ),
    Mutation(
        "an ended session is forgotten by its last message",
        "elif session.ended is not None and now.seconds - session.ended > SESSION_SECONDS:",
        "elif session.ended is not None and now.seconds - session.begun > SESSION_SECONDS:",
    ),
    Mutation(
        "Calls stay outstanding at a charger that is gone",
        "        self.outstanding, self.waiting = None, {}\n",
        "        self.waiting = {}\n",
    ),
    Mutation(
        "Calls that wait for a charger that is gone are not answered",
        "        calls += itertools.chain(*self.waiting.values())\n",
        "",
    ),
    Mutation(
        "Calls of a server that is gone still reach the charger",
        "        self.waiting.pop(peer, None)\n",
        "",
    ),
    Mutation(
        "the Call of a server that is gone is not abandoned",
        "            self.outstanding.is_abandoned = True\n",
        "            pass\n",
    ),
    Mutation(
        "a CallResultError of a new connection is about the old one's answer",
        "        if self.last_answered and self.last_answered[0] is peer:\n"
        "            self.last_answered = None\n",
        "",
    ),
    Mutation(
        "a CallResultError of the charger goes to another connection than the answer's",
        "        if self.last_relayed and self.last_relayed[0] is peer:\n"
        "            self.last_relayed = None\n",
        "",
    ),
]
