//! Sound devices on the guest's side, audio backends on the host's.

use super::controllers::virtio_device;
use super::json::Json;
use super::line::{Line, id};
use crate::config::domain::Domain;
use crate::config::domain::displays::GraphicsType;
use crate::config::domain::sound::{Audio, AudioType, CodecType, Sound, SoundModel};

/// Adds the audio backends; one that plays nowhere if the domain names none.
pub(super) fn audios(line: &mut Line<'_>, domain: &Domain) {
    for audio in &domain.devices.audios {
        audio_backend(line, audio);
    }
    if domain.devices.audios.is_empty() {
        let mut graphics = domain.devices.graphics.iter();
        let is_spice = graphics.any(|graphics| graphics.kind == GraphicsType::Spice);
        let driver = if is_spice { "spice" } else { "none" };
        line.option(
            "audiodev",
            Json::empty()
                .with("id", "audio1")
                .with("driver", driver)
                .write(),
        );
    }
}

fn audio_backend(line: &mut Line<'_>, audio: &Audio) {
    let driver = match audio.kind {
        AudioType::None => "none",
        AudioType::Alsa => "alsa",
        AudioType::Coreaudio => "coreaudio",
        AudioType::Jack => "jack",
        AudioType::Oss => "oss",
        AudioType::Pulseaudio => "pa",
        AudioType::Pipewire => "pipewire",
        AudioType::Sdl => "sdl",
        AudioType::Spice => "spice",
        AudioType::File => "wav",
        AudioType::Dbus => "dbus",
    };
    let path = audio
        .path
        .as_deref()
        .filter(|_| audio.kind == AudioType::File);
    let backend = Json::empty()
        .with("id", format!("audio{}", audio.id))
        .with("driver", driver)
        .with_some("path", path)
        .with_some("server", audio.server.as_deref())
        .with_some("timer-period", audio.timer_period);
    if audio.driver.is_some() || audio.runtime_dir.is_some() {
        line.warning_at(
            "domain/devices/audio",
            audio.line,
            "the host's own way to its sound server is used",
        );
    }
    line.option("audiodev", backend.write());
}

/// The id of a backend: the one with this number, or the first.
pub(super) fn audiodev(domain: &Domain, number: Option<u32>) -> Option<String> {
    let first = domain.devices.audios.first().map_or(1, |audio| audio.id);
    Some(format!("audio{}", number.unwrap_or(first)))
}

/// The backend of the PC speaker, which is part of the machine.
pub(super) fn speaker(domain: &Domain) -> Option<String> {
    let mut sounds = domain.devices.sounds.iter();
    let speaker = sounds.find(|sound| sound.model == SoundModel::Pcspk)?;
    audiodev(domain, speaker.audio)
}

/// Adds the sound devices.
pub(super) fn sounds(line: &mut Line<'_>, domain: &Domain) {
    for sound in &domain.devices.sounds {
        let audio = audiodev(domain, sound.audio);
        match sound.model {
            SoundModel::Pcspk => {}
            SoundModel::Sb16 => line.device(
                Json::device("sb16").with_some("audiodev", audio),
                &sound.info,
            ),
            SoundModel::Es1370 => line.device(
                Json::device("ES1370").with_some("audiodev", audio),
                &sound.info,
            ),
            SoundModel::Ac97 => line.device(
                Json::device("AC97").with_some("audiodev", audio),
                &sound.info,
            ),
            SoundModel::Ich6 => hda(line, sound, "intel-hda", audio),
            SoundModel::Ich9 => hda(line, sound, "ich9-intel-hda", audio),
            SoundModel::Ich7 => {
                line.error(
                    &sound.info,
                    "QEMU has no such sound device",
                    Some("use model='ich9'"),
                );
            }
            SoundModel::Usb => {
                let device = Json::device("usb-audio").with_some("audiodev", audio);
                line.usb_device(device.with_some("multi", sound.multichannel), &sound.info);
            }
            SoundModel::Virtio => {
                let device = virtio_device("virtio-sound", None, sound.virtio)
                    .with_some("audiodev", audio)
                    .with_some("streams", sound.streams);
                line.device(device, &sound.info);
            }
        }
    }
}

fn hda(line: &mut Line<'_>, sound: &Sound, driver: &str, audio: Option<String>) {
    line.device(Json::device(driver), &sound.info);
    let codecs = match sound.codecs.as_slice() {
        [] => &[CodecType::Duplex],
        codecs => codecs,
    };
    let name = id(&sound.info);
    for (number, codec) in codecs.iter().enumerate() {
        let driver = match codec {
            CodecType::Duplex => "hda-duplex",
            CodecType::Micro => "hda-micro",
            CodecType::Output => "hda-output",
        };
        let device = Json::device(driver)
            .with("id", format!("{name}-codec{number}"))
            .with("bus", format!("{name}.0"))
            .with("cad", number)
            .with_some("audiodev", audio.as_deref());
        line.plain_device(device);
    }
}
