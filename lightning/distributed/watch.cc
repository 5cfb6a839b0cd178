#include "lightning/distributed/watch.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "lightning/distributed/last_words.h"
#include "lightning/distributed/launcher.h"
#include "lightning/distributed/lookout.h"
#include "lightning/distributed/message_bytes.h"
#include "lightning/distributed/whereabouts.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

// After a first failure, until its cause is looked for among all that came: an error may be one of
// all ranks, or follow from another's; the launcher may know how a process ended that is gone.
constexpr milliseconds kListen{2000};
constexpr milliseconds kListenForStatus{1000};
// For a rank that raised, from then until it is ended: its hooks may save something.
constexpr seconds kCleanUp{6};
// A process that holds no connection is not waited for longer than this.
constexpr seconds kConnect{60};
// Longest text of an error that is passed on.
constexpr size_t kMostText = 16 * 1024;

// How much a piece of news says about the cause of a failure. Of equal ones the first counts.
enum class Weight : uint8_t {
  kConsequence,  // a collective broke
  kGone,         // a connection ended without a word
  kEnded,        // how a process ended
  kRaised,       // its own error
};

enum class Message : uint8_t {
  kHello,      // secret, host, place; to rank 0
  kFailure,    // rank, weight, text; to rank 0, and rank 0's own to all
  kLeft,       // rank: its program ends in good order
  kEnd,        // text: all end
  kAllRaise,   // every rank raises: no one is ended
  kAskToMeet,  // matter, meetings agreed on so far; to rank 0
  kWhere,      // matter: which place will you not pass before you know?; to all
  kHere,       // matter, place; to rank 0
  kMeetAt,     // matter, place; to all
  kSignal,     // number, or 0; to rank 0
  kAskWhere,   // what do the others do?; to rank 0
  kTellWhere,  // what do you do?; to all
  kDoing,      // whereabouts; to rank 0
  kDoings      // rank and whereabouts of each; to all
};

constexpr auto kMatters = static_cast<size_t>(Matter::kValidation) + 1;
// Places of a run are numbered from a multiple of this, so that later runs have higher numbers.
constexpr int64_t kPlacesOfRun = int64_t{1} << 40;

struct Failure {
  int64_t rank = 0;
  Weight weight = Weight::kGone;
  std::string text;
  int status = 1;  // of all processes
};

bool is_consequence(const std::string& error) {
  for (const char* sign :
       {"onnection closed by peer", "onnection reset by peer", "Broken pipe", "gloo/transport",
        "Gloo connect", "ncclRemoteError", "NCCL communicator was aborted", "NCCL error",
        "recvValue failed", "failed to recv", "Connection was likely closed", "sendBytes failed",
        "The client socket has", "for the other ranks in vain"}) {
    if (error.find(sign) != std::string::npos) return true;
  }
  return false;
}

// ---- Bytes --------------------------------------------------------------------------------------

std::string framed(Message type, const std::string& body) {
  std::string frame;
  put_number(frame, static_cast<int64_t>(body.size()) + 1);
  frame += static_cast<char>(type);
  return frame + body;
}

std::string numbers(std::initializer_list<int64_t> all) {
  std::string body;
  for (const auto one : all) put_number(body, one);
  return body;
}

std::string failure_body(const Failure& failure) {
  std::string body;
  put_number(body, failure.rank);
  put_number(body, static_cast<int64_t>(failure.weight));
  put_text(body, failure.text.substr(0, kMostText));
  return body;
}

Failure read_failure(const std::string& body) {
  MessageReader reader(body);
  Failure failure;
  failure.rank = reader.number();
  failure.weight = static_cast<Weight>(std::clamp<int64_t>(reader.number(), 0, 3));
  failure.text = reader.text();
  return failure;
}

// ---- Sockets ------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what, int reason) {
  throw std::runtime_error(
      str("The ranks of a run cannot watch each other: ", what, ": ", std::strerror(reason), "."));
}

// The kernel finds out about a host that is gone; a process that is only stopped still counts.
void prepare(int fd) {
  const auto set = [fd](int level, int name, int value) {
    ::setsockopt(fd, level, name, &value, sizeof value);
  };
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 2);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set(IPPROTO_TCP, TCP_KEEPCNT, 4);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, 6000);
  set(IPPROTO_TCP, TCP_NODELAY, 1);
}

std::string numeric_address(const sockaddr* address, socklen_t length) {
  char host[NI_MAXHOST] = "";
  ::getnameinfo(address, length, host, sizeof host, nullptr, 0, NI_NUMERICHOST);
  const std::string text = host;
  return text.rfind("::ffff:", 0) == 0 ? text.substr(7) : text;
}

std::string local_address(int fd) {
  sockaddr_storage own{};
  socklen_t length = sizeof own;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&own), &length) != 0) return "";
  return numeric_address(reinterpret_cast<sockaddr*>(&own), length);
}

int listen_on(bool this_machine_only, int* port) {
  const int fd = ::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  sockaddr_in6 any{};
  any.sin6_family = AF_INET6;
  any.sin6_addr = in6addr_any;
  sockaddr_in any4{};
  any4.sin_family = AF_INET;
  any4.sin_addr.s_addr = htonl(this_machine_only ? INADDR_LOOPBACK : INADDR_ANY);
  int bound = -1;
  int use = fd;
  if (fd >= 0 && !this_machine_only) {
    const int off = 0;
    ::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    bound = ::bind(fd, reinterpret_cast<sockaddr*>(&any), sizeof any);
  }
  if (bound != 0) {  // this machine alone, or a kernel without IPv6
    if (fd >= 0) ::close(fd);
    use = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (use < 0) fail("socket", errno);
    if (::bind(use, reinterpret_cast<sockaddr*>(&any4), sizeof any4) != 0) fail("bind", errno);
  }
  if (::listen(use, 1024) != 0) fail("listen", errno);
  sockaddr_storage own{};
  socklen_t length = sizeof own;
  ::getsockname(use, reinterpret_cast<sockaddr*>(&own), &length);
  *port = ntohs(own.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&own)->sin6_port
                                          : reinterpret_cast<sockaddr_in*>(&own)->sin_port);
  return use;
}

int connect_to(const std::string& address, const std::string& port) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  const auto end = Clock::now() + kConnect;
  while (true) {
    addrinfo* found = nullptr;
    const int unknown = ::getaddrinfo(address.c_str(), port.c_str(), &hints, &found);
    int reason = EHOSTUNREACH;
    for (auto* one = found; unknown == 0 && one != nullptr; one = one->ai_next) {
      const int fd = ::socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
      if (fd < 0) continue;
      if (::connect(fd, one->ai_addr, one->ai_addrlen) == 0) {
        ::freeaddrinfo(found);
        return fd;
      }
      reason = errno;
      ::close(fd);
    }
    if (found != nullptr) ::freeaddrinfo(found);
    if (Clock::now() >= end) fail("no connection to rank 0 at " + address, reason);
    std::this_thread::sleep_for(milliseconds(100));
  }
}

std::string random_secret() {
  unsigned char bytes[16];
  if (::getrandom(bytes, sizeof bytes, 0) != sizeof bytes) fail("getrandom", errno);
  std::string text;
  for (const auto byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::atomic<int64_t> messages_sent{0};

// A connection, and what of the next message is there.
struct Peer {
  int fd = -1;
  std::string bytes;
  bool admitted = false;
  ProcessPlace place;
  std::string host;

  // False where it is broken. Messages are short and few: they fit what the kernel takes at once.
  void send(Message type, const std::string& body) const {
    const auto frame = framed(type, body);
    ++messages_sent;
    size_t sent = 0;
    while (sent < frame.size()) {
      const auto rc = ::send(fd, frame.data() + sent, frame.size() - sent, MSG_NOSIGNAL);
      if (rc < 0 && errno == EINTR) continue;
      if (rc < 0 && errno == EAGAIN) {
        pollfd ready{fd, POLLOUT, 0};
        if (::poll(&ready, 1, 1000) <= 0) return;
        continue;
      }
      if (rc <= 0) return;  // reading will tell
      sent += static_cast<size_t>(rc);
    }
  }

  // Reads what is there; false at the end of the connection.
  bool receive() {
    char part[4096];
    while (true) {
      const auto rc = ::recv(fd, part, sizeof part, MSG_DONTWAIT);
      if (rc > 0) {
        bytes.append(part, static_cast<size_t>(rc));
        continue;
      }
      if (rc < 0 && errno == EINTR) continue;
      return rc < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
  }

  std::optional<std::pair<Message, std::string>> next() {
    if (bytes.size() < 9) return std::nullopt;
    const auto length = static_cast<uint64_t>(MessageReader(bytes).number());
    if (length < 1 || length > 4 * kMostText) {
      bytes.clear();  // nothing of ours
      return std::nullopt;
    }
    if (bytes.size() < 8 + length) return std::nullopt;
    auto message = std::make_pair(static_cast<Message>(bytes[8]), bytes.substr(9, length - 1));
    bytes.erase(0, 8 + length);
    return message;
  }
};

// Where ranks meet over a matter. Places count up alike on all ranks.
//
// One round at a time: nobody asks again before all have met, which a collective makes sure of. A
// place behind the end of a run is the first of the next.
struct Meeting {
  int64_t place = 0;                  // the last that this rank has come to
  int64_t rounds = 0;                 // agreed on so far
  std::optional<int64_t> goes_until;  // while a round is open: waits there for what is agreed on
  std::optional<int64_t> at;          // agreed on, and not met yet
};

// Rank 0's, of its thread alone.
struct Round {
  bool open = false;
  std::map<int64_t, int64_t> places;  // by rank that has answered
};

std::atomic<Watch*> installed{nullptr};
std::atomic<int> signal_that_came{0};
std::atomic<int> wakes_thread{-1};  // of the Watch

}  // namespace

struct Watch::Impl {
  ProcessPlace place;
  std::string secret;
  int port = 0;
  int listening = -1;       // rank 0's
  std::vector<Peer> peers;  // rank 0's: all others; else rank 0
  int wake = -1;

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::function<void()>> tasks;  // for the thread
  std::string address;                       // own_address()
  int runs = 0;
  std::set<int64_t> left;               // ranks whose programs ended in good order
  bool raising = false;                 // report() was called
  bool settled = false;                 // and answered
  bool ending = false;                  // all processes end
  int exit_status = 1;                  // then
  std::atomic<bool> all_raised{false};  // since the last run began

  std::atomic<int64_t> joined{1};

  std::atomic<bool> training{false};
  int64_t training_runs = 0;
  std::array<Meeting, kMatters> meetings;
  ToldDoings told;

  // Of the thread alone.
  std::array<Round, kMatters> open_rounds;
  Lookout lookout;
  int signal_told = 0;
  std::vector<Failure> failures;
  std::map<int64_t, std::string> raised;  // the last error of each rank
  std::map<int64_t, std::string> hosts;
  std::optional<Clock::time_point> verdict_at;
  std::optional<Clock::time_point> end_at;
  std::string last_of_rank_0;

  bool is_host() const { return place.global_rank == 0; }

  void post(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      tasks.push_back(std::move(task));
    }
    const uint64_t one = 1;
    if (::write(wake, &one, sizeof one) != sizeof one) {
      // It is full of such ones already.
    }
  }

  void to_all(Message type, const std::string& body) {
    for (const auto& peer : peers) {
      if (peer.admitted) peer.send(type, body);
    }
  }

  std::string describe(const Failure& failure) {
    const auto host = hosts.find(failure.rank);
    const auto own = raised.find(failure.rank);
    const auto& text =
        failure.weight == Weight::kGone && own != raised.end() ? own->second : failure.text;
    return str("Rank ", failure.rank, " of ", place.world_size, " on host ",
               host == hosts.end() ? "?" : host->second, " ", text,
               "\nAll processes of the run end.\n");
  }

  // ---- Rank 0 -----------------------------------------------------------------------------------

  void on_failure(const Failure& failure) {
    if (ending) return;
    failures.push_back(failure);
    if (failure.weight == Weight::kRaised) raised[failure.rank] = failure.text;
    if (failure.rank == 0) to_all(Message::kFailure, failure_body(failure));
    const auto listen = failure.weight == Weight::kEnded  ? milliseconds(0)
                        : failure.weight == Weight::kGone ? kListenForStatus
                                                          : kListen;
    verdict_at = std::min(verdict_at.value_or(Clock::time_point::max()), Clock::now() + listen);
    std::set<int64_t> spoke;
    bool all_raise = true;
    bool one_is_gone = false;
    for (const auto& one : failures) {
      spoke.insert(one.rank);
      all_raise = all_raise && one.weight == Weight::kRaised;
      one_is_gone = one_is_gone || one.weight == Weight::kGone;
    }
    if (static_cast<int64_t>(spoke.size()) < place.world_size || one_is_gone) return;
    verdict_at = Clock::now();  // there is nothing more to hear
    if (!all_raise) return;
    failures.clear();
    verdict_at.reset();
    to_all(Message::kAllRaise, "");
    all_raised = true;
    settle();
  }

  void give_verdict() {
    verdict_at.reset();
    const auto cause =
        std::max_element(failures.begin(), failures.end(),
                         [](const auto& a, const auto& b) { return a.weight < b.weight; });
    const auto text = describe(*cause);
    std::string body;
    put_number(body, cause->status);
    put_text(body, text);
    to_all(Message::kEnd, body);
    last_words(text);
    end(cause->status);
  }

  void take_up(int fd) {
    prepare(fd);
    Peer peer;
    peer.fd = fd;
    peers.push_back(std::move(peer));
  }

  void accept_all() {
    while (true) {
      const int fd = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) return;
      take_up(fd);
    }
  }

  // What comes from a process before it has shown the secret is not looked at.
  void on_message_to_host(Peer& peer, Message type, const std::string& body) {
    MessageReader reader(body);
    if (!peer.admitted) {
      peer.admitted = type == Message::kHello && reader.text() == secret;
      peer.host = reader.text();
      peer.place.global_rank = reader.number();
      peer.place.node_rank = reader.number();
      if (!peer.admitted) return;
      if (hosts.emplace(peer.place.global_rank, peer.host).second) ++joined;
      for (size_t i = 0; i < kMatters; ++i) {
        if (open_rounds[i].open) peer.send(Message::kWhere, numbers({static_cast<int64_t>(i)}));
      }
      if (peer.place.node_rank == place.node_rank) return;
      const std::lock_guard<std::mutex> lock(mutex);
      address = local_address(peer.fd);
      changed.notify_all();
      return;
    }
    if (type == Message::kFailure) on_failure(read_failure(body));
    if (type == Message::kAskToMeet) {
      const auto matter = read_matter(reader);
      open_round(matter, reader.number());
    }
    if (type == Message::kHere) {
      const auto matter = read_matter(reader);
      is_at(matter, peer.place.global_rank, reader.number());
    }
    if (type == Message::kLeft) {
      to_all(type, body);
      on_left(reader.number());
    }
    const int64_t rank = peer.place.global_rank;
    if (type == Message::kSignal) on_signal_of(rank, reader.number());
    if (type == Message::kAskWhere) look_out();
    if (type == Message::kDoing) on_doing(rank, read_doing(reader));
  }

  void on_end_of(const Peer& peer) {
    const int64_t rank = peer.place.global_rank;
    if (!peer.admitted || left.count(rank) > 0) return;
    if (all_raised) return on_left(rank);
    on_failure({rank, Weight::kGone,
                "lost its connection without a word: it was killed, or its host is gone."});
  }

  // ---- Meeting ----------------------------------------------------------------------------------

  static int64_t read_matter(MessageReader& reader) {
    return std::clamp<int64_t>(reader.number(), 0, kMatters - 1);
  }

  // A rank that asks waits where it is; another goes on to its next place.
  int64_t goes_until(int64_t matter) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& meeting = meetings[matter];
    if (!meeting.goes_until) meeting.goes_until = meeting.place + 1;
    return *meeting.goes_until;
  }

  void meet_at(int64_t matter, int64_t where) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& meeting = meetings[matter];
    meeting.at = where;
    meeting.goes_until.reset();
    ++meeting.rounds;
    changed.notify_all();
  }

  // Who asked before it heard of a round was asked in that round where it is.
  void open_round(int64_t matter, int64_t rounds_known) {
    auto& round = open_rounds[matter];
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (round.open || rounds_known != meetings[matter].rounds) return;
    }
    round.open = true;
    to_all(Message::kWhere, numbers({matter}));
    is_at(matter, 0, goes_until(matter));
  }

  void is_at(int64_t matter, int64_t rank, int64_t where) {
    auto& round = open_rounds[matter];
    round.places[rank] = where;
    if (static_cast<int64_t>(round.places.size()) < place.world_size) return;
    int64_t last = 0;
    for (const auto& one : round.places) last = std::max(last, one.second);
    round = Round();
    to_all(Message::kMeetAt, numbers({matter, last}));
    meet_at(matter, last);
  }

  // ---- Who waits for whom -----------------------------------------------------------------------

  void on_signal_of(int64_t rank, int64_t number) { lookout.on_signal(rank, number, Clock::now()); }

  void look_out() {
    if (!lookout.begin()) return;
    to_all(Message::kTellWhere, "");
    on_doing(place.global_rank, whereabouts());
  }

  void on_doing(int64_t rank, const Whereabouts& doing) {
    auto all = lookout.on_answer(rank, doing, place.world_size);
    if (!all) return;
    to_all(Message::kDoings, message_of(*all));
    if (const auto stuck = lookout.find_stuck(*all, Clock::now())) {
      on_failure({stuck->rank, Weight::kEnded, stuck->text, 128 + stuck->signal});
    }
    told.hear(std::move(*all));
  }

  void ask_where() { is_host() ? look_out() : to_host(Message::kAskWhere, ""); }

  // A signal's handler only wakes this thread.
  void tell_signal() {
    const int number = signal_that_came;
    if (number == std::exchange(signal_told, number)) return;
    is_host() ? on_signal_of(place.global_rank, number)
              : to_host(Message::kSignal, numbers({number}));
  }

  void to_host(Message type, const std::string& body) {
    if (!peers.empty()) peers[0].send(type, body);
  }

  // ---- The others -------------------------------------------------------------------------------

  void on_message_to_member(Message type, const std::string& body) {
    if (type == Message::kFailure) last_of_rank_0 = read_failure(body).text;
    if (type == Message::kLeft) on_left(MessageReader(body).number());
    MessageReader reader(body);
    if (type == Message::kWhere) {
      const auto matter = read_matter(reader);
      to_host(Message::kHere, numbers({matter, goes_until(matter)}));
    }
    if (type == Message::kMeetAt) {
      const auto matter = read_matter(reader);
      meet_at(matter, reader.number());
    }
    if (type == Message::kTellWhere) to_host(Message::kDoing, message_of(whereabouts()));
    if (type == Message::kDoings) told.hear(read_doings(reader));
    if (type == Message::kAllRaise) {
      last_of_rank_0.clear();
      all_raised = true;
      settle();
    }
    if (type == Message::kEnd) {
      const auto status = static_cast<int>(reader.number());
      if (place.local_rank == 0) last_words(reader.text());
      end(status);
    }
  }

  void on_end_of_host() {
    if (left.count(0) > 0) return;
    if (all_raised) return on_left(0);
    const bool speaks = place.node_rank == 0 ? place.local_rank == 1 : place.local_rank == 0;
    if (speaks && !ending) {
      last_words(
          describe({0, Weight::kEnded,
                    last_of_rank_0.empty()
                        ? "lost its connection without a word: it was killed, or its host is gone."
                        : last_of_rank_0}));
    }
    end();
  }

  // ---- Both -------------------------------------------------------------------------------------

  void on_left(int64_t rank) {
    bool in_run = false;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      left.insert(rank);
      in_run = runs > 0;
    }
    if (in_run) tell({rank, Weight::kEnded, "ended its program while other ranks were in a run."});
  }

  void tell(const Failure& failure) {
    if (is_host()) return on_failure(failure);
    for (const auto& peer : peers) peer.send(Message::kFailure, failure_body(failure));
  }

  void settle() {
    const std::lock_guard<std::mutex> lock(mutex);
    settled = true;
    raising = false;
    changed.notify_all();
  }

  void end(int status = 1) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (ending) return;
    ending = true;
    if (status != 1) exit_status = status;
    end_at = Clock::now() + (raising ? milliseconds(kCleanUp) : milliseconds(0));
    if (raising) {
      settled = true;
      changed.notify_all();
    }
  }

  // Processes that raise may need the time to clean up too.
  [[noreturn]] void finish() {
    wait_for_local_ranks(kCleanUp + seconds(1));
    kill_local_ranks();
    wait_for_local_ranks(seconds(1));
    end_process(exit_status);
  }

  void do_tasks() {
    uint64_t count = 0;
    if (::read(wake, &count, sizeof count) < 0) return;
    std::vector<std::function<void()>> now;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      now.swap(tasks);
    }
    for (const auto& task : now) task();
  }

  int milliseconds_left() const {
    auto next = verdict_at;
    for (const auto& one : {end_at, lookout.next()}) {
      if (one && (!next || *one < *next)) next = one;
    }
    if (!next) return -1;
    const auto left_ms = std::chrono::duration_cast<milliseconds>(*next - Clock::now()).count();
    return static_cast<int>(std::max<int64_t>(left_ms + 1, 0));
  }

  void read_peers(const std::vector<pollfd>& ready) {
    std::vector<int> gone;
    for (size_t i = 0; i < peers.size(); ++i) {
      const auto found = std::find_if(ready.begin(), ready.end(),
                                      [&](const auto& one) { return one.fd == peers[i].fd; });
      if (found == ready.end() || found->revents == 0) continue;
      const bool open = peers[i].receive();
      while (auto message = peers[i].next()) {
        is_host() ? on_message_to_host(peers[i], message->first, message->second)
                  : on_message_to_member(message->first, message->second);
      }
      if (!open) gone.push_back(peers[i].fd);
    }
    for (const int fd : gone) {
      const auto place_of = std::find_if(peers.begin(), peers.end(),
                                         [fd](const Peer& peer) { return peer.fd == fd; });
      const Peer peer = *place_of;
      peers.erase(place_of);
      ::close(fd);
      is_host() ? on_end_of(peer) : on_end_of_host();
    }
  }

  [[noreturn]] void run() {
    while (true) {
      std::vector<pollfd> fds{{wake, POLLIN, 0}};
      if (is_host()) fds.push_back({listening, POLLIN, 0});
      for (const auto& peer : peers) fds.push_back({peer.fd, POLLIN, 0});
      ::poll(fds.data(), fds.size(), milliseconds_left());
      if (fds[0].revents != 0) do_tasks();
      if (is_host() && fds[1].revents != 0) accept_all();
      tell_signal();
      read_peers(fds);
      if (lookout.due(Clock::now())) look_out();
      if (verdict_at && Clock::now() >= *verdict_at) give_verdict();
      if (end_at && Clock::now() >= *end_at) finish();
    }
  }

  void start() {
    wake = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake < 0) fail("eventfd", errno);
    wakes_thread = wake;
    hosts[place.global_rank] = host_name();
    std::thread([this] { run(); }).detach();
    set_child_listener([this](int64_t rank, bool success, const std::string& how) {
      post([this, rank, success, how] { on_child_end(rank, success, how); });
    });
  }

  // Who joined says goodbye over its connection, or loses it: the exit status 0 adds nothing.
  void on_child_end(int64_t rank, bool success, const std::string& how) {
    if (all_raised || (success && (!is_host() || hosts.count(rank) > 0))) return;
    if (hosts.count(rank) == 0) hosts[rank] = host_name();  // of this node, as its child
    tell({rank, Weight::kEnded, "ended with " + how + " before the others did."});
  }
};

Watch::Watch(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Watch::~Watch() = default;

Watch* Watch::current() { return installed.load(); }

Watch& Watch::install(std::unique_ptr<Impl> impl) {
  if (installed.load() != nullptr) throw std::logic_error("A process has one Watch.");
  auto* watch = new Watch(std::move(impl));
  watch->impl_->start();
  installed = watch;
  return *watch;
}

Watch& Watch::host(const ProcessPlace& place, bool this_machine_only) {
  auto impl = std::make_unique<Impl>();
  impl->place = place;
  impl->secret = random_secret();
  impl->listening = listen_on(this_machine_only, &impl->port);
  return install(std::move(impl));
}

Watch& Watch::join(const ProcessPlace& place, const std::string& address,
                   const std::string& meeting_point) {
  auto impl = std::make_unique<Impl>();
  impl->place = place;
  const auto space = meeting_point.find(' ');
  if (space == std::string::npos) {
    throw std::logic_error("A meeting point is a port and a secret.");
  }
  Peer host;
  host.fd = connect_to(address, meeting_point.substr(0, space));
  host.admitted = true;
  prepare(host.fd);
  std::string hello;
  put_text(hello, meeting_point.substr(space + 1));
  put_text(hello, host_name());
  put_number(hello, place.global_rank);
  put_number(hello, place.node_rank);
  host.send(Message::kHello, hello);
  impl->address = local_address(host.fd);
  sockaddr_storage other{};
  socklen_t length = sizeof other;
  ::getpeername(host.fd, reinterpret_cast<sockaddr*>(&other), &length);
  impl->hosts[0] = place.node_rank == 0
                       ? host_name()
                       : numeric_address(reinterpret_cast<sockaddr*>(&other), length);
  impl->peers.push_back(std::move(host));
  auto& watch = install(std::move(impl));
  outlive_launcher();
  return watch;
}

std::string Watch::meeting_point() const { return str(impl_->port, " ", impl_->secret); }

std::string Watch::own_address() {
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->changed.wait(lock, [this] { return !impl_->address.empty(); });
  return impl_->address;
}

bool Watch::trains() const { return impl_->training; }

int64_t Watch::messages() const { return messages_sent; }

const ProcessPlace& Watch::place() const { return impl_->place; }

int64_t Watch::joined() const { return impl_->joined; }

void Watch::on_stop_signal(int number) {
  const int reason = errno;
  signal_that_came = number;
  const uint64_t one = 1;
  const int fd = wakes_thread;
  if (fd >= 0 && ::write(fd, &one, sizeof one) != sizeof one) {
    // It is full of such ones already.
  }
  errno = reason;
}

int Watch::stop_signal() { return signal_that_came; }

std::string Watch::where_others_are() {
  auto& impl = *impl_;
  return impl.told.ask_of_others(impl.place.global_rank,
                                 [&impl] { impl.post([&impl] { impl.ask_where(); }); });
}

bool Watch::meet_here(Matter matter, bool asks) {
  auto& impl = *impl_;
  const auto number = static_cast<int64_t>(matter);
  std::unique_lock<std::mutex> lock(impl.mutex);
  auto& meeting = impl.meetings[number];
  ++meeting.place;
  if (asks && !meeting.goes_until && !meeting.at) {
    meeting.goes_until = meeting.place;
    const auto rounds = meeting.rounds;
    lock.unlock();
    impl.post([&impl, number, rounds] {
      impl.is_host() ? impl.open_round(number, rounds)
                     : impl.to_host(Message::kAskToMeet, numbers({number, rounds}));
    });
    lock.lock();
  }
  impl.changed.wait(lock,
                    [&] { return !meeting.goes_until || meeting.place < *meeting.goes_until; });
  const bool here = meeting.at && meeting.place >= *meeting.at;
  if (here) meeting.at.reset();
  return here;
}

Scope Watch::in_run(bool trains) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  if (!impl_->left.empty()) {
    throw std::runtime_error(str("Rank ", *impl_->left.begin(), " has ended its program, and rank ",
                                 impl_->place.global_rank,
                                 " begins another run, which needs all ranks. Let every rank call "
                                 "the same runs."));
  }
  ++impl_->runs;
  impl_->all_raised = false;
  impl_->training = trains;
  if (trains) {
    ++impl_->training_runs;
    for (auto& one : impl_->meetings) one.place = impl_->training_runs * kPlacesOfRun;
  }
  return scope_exit([this] {
    const std::lock_guard<std::mutex> lock_again(impl_->mutex);
    --impl_->runs;
    impl_->training = false;
  });
}

bool Watch::report(const std::string& error) {
  auto& impl = *impl_;
  const Failure failure{impl.place.global_rank,
                        is_consequence(error) ? Weight::kConsequence : Weight::kRaised,
                        "failed: " + error};
  std::unique_lock<std::mutex> lock(impl.mutex);
  const bool cause = failure.weight == Weight::kRaised;
  impl.settled = false;
  impl.raising = cause;  // who only suffers has nothing to clean up
  lock.unlock();
  impl.post([&impl, failure] { impl.tell(failure); });
  lock.lock();
  // Rank 0 may be gone; the thread ends this process then.
  impl.changed.wait(lock, [&] { return impl.settled; });
  return impl.all_raised;
}

void Watch::leave(int status, const std::function<void()>& once_told) {
  auto& impl = *impl_;
  bool ending = false;
  bool in_run = false;
  {
    const std::lock_guard<std::mutex> lock(impl.mutex);
    ending = impl.ending;
    in_run = impl.runs > 0;
    if (status != 0) impl.exit_status = status;
  }
  if (ending) impl.finish();
  const bool raised = impl.all_raised;  // the others too: they know why this one ends
  if (in_run || (status != 0 && !raised)) {
    impl.post([&impl, status, in_run] {
      impl.tell({impl.place.global_rank, Weight::kEnded,
                 str("ended its program with exit status ", status,
                     in_run ? " in the middle of a run." : ".")});
    });
    std::this_thread::sleep_for(kListen + seconds(2));  // the verdict ends this process
    impl.finish();
  }
  impl.post([&impl] {
    std::string body;
    put_number(body, impl.place.global_rank);
    if (impl.is_host()) impl.to_all(Message::kLeft, body);
    if (!impl.is_host() && !impl.peers.empty()) impl.peers[0].send(Message::kLeft, body);
  });
  once_told();
  // A failure of one of them ends this process meanwhile.
  const auto end = Clock::now() + kCleanUp;
  while (!wait_for_local_ranks(milliseconds(50)) && (!raised || Clock::now() < end)) {
  }
  kill_local_ranks();
  // What was posted is done before the connection ends.
  std::atomic<bool> done{false};
  impl.post([&done] { done = true; });
  while (!done) std::this_thread::sleep_for(milliseconds(1));
}

bool report_failure(const std::string& error) {
  auto* watch = Watch::current();
  // LibTorch's errors hold where they come from, in many lines.
  return watch == nullptr || watch->report(error.substr(0, error.find("\nException raised from ")));
}

bool meet_here(const Collectives& ranks, Matter matter, bool asks) {
  if (ranks.world_size() == 1) return asks;
  auto* watch = Watch::current();
  return watch == nullptr || watch->meet_here(matter, asks);
}

}  // namespace lightning
