// Plays a device with two streams to csrc/lanes.h and checks what its calls may rely on: every stream carries a clock
// of what is done when it gets there, events hand clocks on. test_plan_lanes.py compiles and runs it.

#include "../csrc/lanes.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
using Clock = std::set<std::string>;  // the calls that are done

struct Machine {
  Clock stream[2];
  int current = 0;
  int events = 0;
} machine;

#define EXPECT(condition)                                          \
  do {                                                             \
    if (!(condition)) {                                            \
      std::printf("line %d: expected %s\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (0)

class Streams final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device d) const override { return d; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device d) const override { return stream(d, machine.current); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return stream(d, 1); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const c10::Stream before = getStream(s.device());
    machine.current = static_cast<int>(s.id());
    return before;
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Clock, ++machine.events;
    *static_cast<Clock*>(*event) = machine.stream[stream.id()];
  }
  void block(void* event, const c10::Stream& stream) const override {
    const Clock& seen = *static_cast<Clock*>(event);
    machine.stream[stream.id()].insert(seen.begin(), seen.end());
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Clock*>(event); }

 private:
  static c10::Stream stream(c10::Device d, int id) { return c10::Stream(c10::Stream::UNSAFE, d, id); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Streams);

// A call: where it runs, it knows what is done.
Clock call(const std::string& name) {
  Clock& clock = machine.stream[machine.current];
  const Clock seen = clock;
  clock.insert(name);
  return seen;
}

void on_streams() {
  fastconv::Lanes lanes({kType, 0}, c10::impl::VirtualGuardImpl(kType));
  for (int run = 0; run < 2; ++run) {
    machine.stream[0].clear(), machine.stream[1].clear();
    call("a");
    lanes.aside(1, [] {
      EXPECT(machine.current == 1);
      EXPECT(call("b") == Clock{"a"});
    });
    EXPECT(machine.current == 0);
    EXPECT(call("c") == Clock{"a"});  // beside b
    lanes.aside(3, [] { EXPECT((call("d") == Clock{"a", "b", "c"})); });
    EXPECT((call("e") == Clock{"a", "c"}));
    lanes.aside(5, [] { EXPECT((call("f") == Clock{"a", "b", "c", "d", "e"})); });
    lanes.join(3);
    EXPECT((call("g") == Clock{"a", "b", "c", "d", "e"}));  // not f
    lanes.join(5);
    EXPECT((call("h") == Clock{"a", "b", "c", "d", "e", "f", "g"}));
    lanes.abandon();  // nothing is on its way: no event is recorded anew
    EXPECT(machine.events == 6);
  }
}

void on_streams_with_an_exception() {
  machine.stream[0].clear(), machine.stream[1].clear();
  fastconv::Lanes lanes({kType, 0}, c10::impl::VirtualGuardImpl(kType));
  lanes.aside(0, [] { call("a"); });
  try {
    lanes.aside(1, [] {
      call("b");
      throw std::runtime_error("half way");
    });
    EXPECT(false);
  } catch (const std::runtime_error&) {
    EXPECT(machine.current == 0);
    lanes.abandon();
  }
  EXPECT((call("c") == Clock{"a", "b"}));
}

void without_streams() {
  fastconv::Lanes lanes(c10::Device(c10::kCPU), c10::impl::VirtualGuardImpl(kType));  // whose streams it leaves alone
  std::string order;
  lanes.aside(0, [&] { order += 'a'; });
  lanes.aside(1, [&] { order += 'b'; });
  order += 'c';
  lanes.join(0);
  order += 'd';
  lanes.join(1);
  EXPECT(order == "cadb");
  lanes.aside(0, [&] { order += 'e'; });
  lanes.abandon();
  lanes.join(0);
  EXPECT(order == "cadb");
}

}  // namespace

int main() {
  on_streams();
  on_streams_with_an_exception();
  without_streams();
  std::puts("ok");
}
