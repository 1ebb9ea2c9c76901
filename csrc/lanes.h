// Where a program's calls run: one after another on the current stream, some of them aside on a second one.
//
// On a GPU a call aside waits for all that was issued before it, and join() makes what is issued next wait for the
// call: events between two streams, which a capture turns into edges of its graph. A CPU has no streams: there a call
// aside runs when join() asks for it, as late as the program allows, so that a plan of the emulator shows what a delay
// does.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <utility>

namespace fastconv {

class Lanes {
 public:
  Lanes(c10::Device device, c10::impl::VirtualGuardImpl streams) : streams_(streams) {
    if (!device.is_cpu()) second_.emplace(streams_.getStreamFromGlobalPool(device));
  }

  // Calls are numbered upwards.
  void aside(size_t call, std::function<void()> run) {
    if (!second_) {
      kept_.push_back({call, std::move(run)});
      return;
    }
    Events& events = events_.try_emplace(call, streams_.type()).first->second;
    events.before.record(first());
    events.before.block(*second_);
    on_way_ = call;
    {
      const Current current(streams_, *second_);
      run();
    }
    events.after.record(*second_);
  }

  // What is issued next comes after this call aside, and after those aside before it.
  void join(size_t call) {
    for (; !kept_.empty() && kept_.front().call <= call; kept_.pop_front()) kept_.front().run();
    if (!second_) return;
    events_.at(call).after.block(first());
    if (on_way_ == call) on_way_.reset();
  }

  // For an exception between aside() and join(): nothing is on its way afterwards.
  void abandon() noexcept {
    kept_.clear();
    if (!on_way_) return;
    try {
      events_.at(*on_way_).after.record(*second_);
      join(*on_way_);
    } catch (...) {  // the device has failed: the exception that is being handled says more
      on_way_.reset();
    }
  }

 private:
  struct Events {
    explicit Events(c10::DeviceType type) : before(type), after(type) {}
    c10::Event before, after;
  };
  struct Kept {
    size_t call;
    std::function<void()> run;
  };
  // Makes a stream its device's current one while it lives.
  class Current {
   public:
    Current(const c10::impl::VirtualGuardImpl& streams, c10::Stream to)
        : streams_(streams), before_(streams.exchangeStream(to)) {}
    ~Current() { streams_.exchangeStream(before_); }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const c10::impl::VirtualGuardImpl& streams_;
    c10::Stream before_;
  };

  c10::Stream first() const { return streams_.getStream(second_->device()); }

  c10::impl::VirtualGuardImpl streams_;
  std::optional<c10::Stream> second_;
  std::map<size_t, Events> events_;  // of each call aside, used again at every run
  std::optional<size_t> on_way_;     // the last call aside that nobody has waited for
  std::deque<Kept> kept_;
};

}  // namespace fastconv
