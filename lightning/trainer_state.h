// What a Trainer's run is doing. Source: Lightning 2.6, `lightning.pytorch.trainer.states`.
#pragma once

namespace lightning {

enum class RunningStage { kNone, kTraining, kSanityChecking, kValidating, kTesting, kPredicting };
enum class TrainerStatus { kInitializing, kRunning, kFinished, kInterrupted };

}  // namespace lightning
